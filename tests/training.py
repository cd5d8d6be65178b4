"""A few steps of AdamW on a small model, for the tests of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def batches(vocab: int, steps: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(0, vocab, (4, 9), generator=generator)


def train(model: Any, optimizer: Any, ids: Any) -> float:
    inputs = [ids[:, :-1], torch.ones_like(ids[:, :-1])][: len(model.program.inputs)]
    loss = torch.nn.functional.cross_entropy(model(*inputs).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


SETTINGS = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1}
