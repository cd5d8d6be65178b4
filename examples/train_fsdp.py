"""Grow a model while it is loaded in parts, train it with FSDP2, and take it back into ONNX.

    torchrun --nproc-per-node 2 examples/train_fsdp.py [MODEL] [--steps 50] [--resume]

No rank ever holds the grown model: each computes its own shard from the small file and the plan (MODEL, if given, is
the grown file, and each rank reads its own shard of it). Runs on GPUs with NCCL, or on the CPU with gloo. Writes into
out/: the loss of each step as CSV and PNG, checkpoints of torch.distributed.checkpoint, the trained model as ONNX.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from hyperclone_onnx import analyse, expand, plan_expansion
from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.torch import load


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a grown ONNX file (default: tiny_gpt grown while loading)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


def latest(folder: Path) -> Path:
    """The newest complete checkpoint."""
    return max((file.parent for file in folder.glob("*/.metadata")), key=lambda checkpoint: int(checkpoint.name))


def train(options: Any, device: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,))
    if options.model is None:
        model = load(common.SMALL, plan=plan_expansion(analyse(common.SMALL), 2), shard=mesh)
    else:
        model = load(options.model, shard=mesh)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=options.rate, weight_decay=0.0)
    losses: list[float] = []
    folder, curve = options.output / "fsdp", options.output / "fsdp_losses.csv"
    if options.resume:
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": torch.tensor(0)}
        dcp.load(saved, checkpoint_id=latest(folder))
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        losses = common.read_losses(curve)[: int(saved["step"])]
    steps = options.steps - len(losses)
    for inputs, targets in common.progress(common.batches(options, len(losses)), steps, show=rank == 0):
        # Each rank takes its part of the batch; FSDP averages the gradients.
        ids, labels = (torch.from_numpy(rows[rank::ranks].copy()).to(device) for rows in (inputs, targets))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)
        if len(losses) % 25 == 0 or len(losses) == options.steps:
            weights, state = get_state_dict(model, optimizer)
            saved = {"model": weights, "optimizer": state, "step": torch.tensor(len(losses))}
            dcp.save(saved, storage_writer=dcp.FileSystemWriter(folder / str(len(losses)), overwrite=True))
            if rank == 0:
                common.write_losses(losses, curve)
    if rank == 0:
        common.draw_losses(losses, curve)
        big = options.model or options.output / "tiny_gpt_big.onnx"
        if not big.exists():
            expand(common.SMALL, big, 2, check=False)
        result = absorb(big, latest(folder), options.output / "fsdp_trained.onnx")
        print(f"{options.output / 'fsdp_trained.onnx'}: {len(result.replaced)} tensors replaced")
    dist.barrier()


if __name__ == "__main__":
    main()
