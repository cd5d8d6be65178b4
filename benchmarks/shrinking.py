"""Makes tiny_gpt half as large in several ways, and trains each small model for some steps on the same bytes.

    python benchmarks/shrinking.py [--steps 300] [--output out/shrinking] [--write]

The small models have the same sizes. One of them begins with random weights. All read the same windows in the same
order, with each of the learning rates, and the table has the lower loss of the two. Importance is measured on windows
of the training text. With a teacher, which is the large model, the loss has no label: see `load_teacher`. `--write`
puts the table into docs/shrink.md. It takes a few minutes on one core. Needs torch.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from corpus import read_corpus  # noqa: E402
from pages import put  # noqa: E402

from hyperclone_onnx import shrink  # noqa: E402
from hyperclone_onnx.frameworks.torch import load, load_teacher  # noqa: E402

SOURCE = ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx"
RATES = (1e-3, 3e-3)
BATCH, LENGTH = 16, 128
HELD_OUT = 64
"""The number of windows of held-out text on which a loss is measured."""

Array = npt.NDArray[Any]


def windows(text: bytes, count: int, seed: int) -> Array:
    """Random windows of a text, shape (count, LENGTH + 1)."""
    data = np.frombuffer(text, np.uint8).astype(np.int64)
    starts = np.random.default_rng(seed).integers(0, len(data) - LENGTH - 1, count)
    return np.stack([data[start : start + LENGTH + 1] for start in starts])


def random_again(path: Path, out: Path) -> None:
    """Write a model whose weights begin as those of a GPT do: matrices normal, gains 1, biases 0."""
    model, rng = onnx.load(path), np.random.default_rng(0)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.size < 2:
            continue
        if array.ndim >= 2:
            drawn = rng.standard_normal(array.shape) * 0.02
        else:
            drawn = np.full(array.shape, 1.0 if abs(float(array.mean())) > 0.5 else 0.0)
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn.astype(np.float32), tensor.name))
    onnx.save(model, out)


class Logits(torch.nn.Module):
    """A model that gives its logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **feeds: Any) -> Any:
        """Return the logits."""
        return self.model(**feeds)["logits"]


def loss_of(model: Any, window: Array) -> Any:
    """The mean loss of a model on windows, in nats per byte."""
    ids, labels = torch.from_numpy(window[:, :-1]), torch.from_numpy(window[:, 1:])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def measured(model: Any, held_out: Array) -> float:
    """The loss on held-out windows."""
    with torch.no_grad():
        return float(np.mean([loss_of(model, part).item() for part in np.array_split(held_out, 4)]))


def trained(
    path: Path, batches: Array, held_out: Array, rate: float, hidden: float | None = None
) -> tuple[float, float]:
    """The loss before and after training.

    Args:
        path: the small model.
        batches: the windows of each step.
        held_out: the windows on which the loss is measured.
        rate: the learning rate.
        hidden: the weight of hidden values beside those of the large model, where that is the teacher; None to learn
            from the bytes alone.
    """
    torch.manual_seed(0)
    teacher = None if hidden is None else load_teacher(SOURCE, student=path)
    model = load(path)
    learner = model if not hidden or teacher is None else load(path, values=teacher.values)
    model = model if learner is model else Logits(learner)
    before, steps = measured(model, held_out), len(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.98))
    for step, batch in enumerate(batches):
        warm = min(1.0, (step + 1) / (0.1 * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if teacher is None:
            loss_of(model, batch).backward()
        else:
            ids = torch.from_numpy(batch[:, :-1])
            feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            teacher.loss(learner(**feeds), teacher(**feeds), temperature=1.0, hidden=hidden or 0.0).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return before, measured(model, held_out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "shrinking")
    parser.add_argument("--write", action="store_true", help="put the table into docs/shrink.md")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    text = read_corpus()
    batches = windows(text.train, options.steps * BATCH, 1).reshape(options.steps, BATCH, LENGTH + 1)
    held_out = windows(text.validation, HELD_OUT, 2)
    ids = windows(text.train, 64, 3)[:, :-1]
    data = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    ways: dict[str, dict[str, Any]] = {
        "selection, first": {"method": "selection", "select": "first"},
        "selection, even": {"method": "selection"},
        "importance": {"method": "importance"},
    }
    paths: dict[str, Path] = {}
    for name, how in ways.items():
        paths[name] = options.output / f"{name.replace(', ', '-')}.onnx"
        shrink(SOURCE, paths[name], factor=0.5, data=data, check=False, **how)
    paths["random weights"] = options.output / "random.onnx"
    random_again(paths["selection, even"], paths["random weights"])
    whole = measured(load(SOURCE), held_out)
    rows = [
        f"tiny_gpt at half its widths; {options.steps} steps of {BATCH} windows of {LENGTH} bytes. "
        f"The large model itself has a loss of {whole:.3f} nats per byte on the held-out text.",
        "",
        "| begins as | loss before training | loss after |",
        "|---|---|---|",
    ]
    runs: dict[str, tuple[Path, float | None]] = {name: (path, None) for name, path in paths.items()}
    runs["importance, with a teacher: logits"] = paths["importance"], 0.0
    runs["importance, with a teacher: logits and hidden values"] = paths["importance"], 1.0
    for name, (path, hidden) in runs.items():
        losses = [trained(path, batches, held_out, rate, hidden) for rate in RATES]
        rows.append(f"| {name} | {losses[0][0]:.3f} | {min(after for _, after in losses):.3f} |")
        print(rows[-1], [round(after, 4) for _, after in losses], flush=True)
    table = "\n".join(rows)
    print(table)
    if options.write:
        put("shrink.md", "shrinking", table)


if __name__ == "__main__":
    main()
