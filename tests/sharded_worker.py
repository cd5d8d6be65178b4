"""What each of two processes does in test_frameworks_sharding.py, started by torchrun.

torchrun --nproc-per-node 2 tests/sharded_worker.py SMALL PLAN BIG FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hyperclone_onnx.frameworks.torch import Block, OnnxModule, load


def loss_of(model: Any, ids: Any) -> Any:
    logits = model(ids, torch.ones_like(ids))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def whole_of(parameter: Any) -> Any:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def by_columns(model: OnnxModule) -> None:
    """FSDP2 as a user might apply it: along the last axis of each parameter, and only to the layers."""
    for layer in (module for module in model.modules() if isinstance(module, Block)):
        fully_shard(layer, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))


def main(small: Path, plan: Path, big: Path, folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = load(big)
    stored = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    for source, options in ((small, {"plan": plan}), (big, {})):
        for shard in (mesh, by_columns):
            model = load(source, shard=shard, **options)
            for name, parameter in model.named_parameters():
                if shard is mesh:
                    assert isinstance(parameter, DTensor), name
                    assert parameter.to_local().numel() <= -(-parameter.shape[0] // 2) * parameter[0].numel()
                assert torch.equal(whole_of(parameter), stored[name]), name
    model = load(small, plan=plan, shard=mesh)
    ids = torch.arange(28).reshape(2, 14) % 90 + 3
    expected, got = loss_of(whole, ids), loss_of(model, ids)
    assert abs(expected - got) < 1e-6 * expected, (expected, got)
    expected.backward()
    got.backward()
    largest = max(parameter.grad.abs().max() for parameter in whole.parameters())
    for (name, parameter), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (whole_of(parameter.grad) - other.grad).abs().max() < 1e-5 * largest, name
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "checkpoint")
    again = load(small, plan=plan, shard=by_columns)
    dcp.load({"model": again.state_dict()}, checkpoint_id=folder / "checkpoint")
    for (name, parameter), other in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(whole_of(parameter), whole_of(other)), name
        assert not torch.equal(whole_of(parameter), stored[name]), name
    if dist.get_rank() == 0:
        (folder / "losses").write_text(f"{expected.item()} {got.item()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
