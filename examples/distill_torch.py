"""Train a small model to say what a large one says (distillation), and take it back into ONNX.

    python examples/distill_torch.py [TEACHER] [--student SMALL] [--steps 50] [--resume]

By default the teacher is the committed model, and the student is made of it by `shrink`: half the widths, and the parts
that matter most on some of the bytes. The loss is the KL divergence of the student from the teacher at a temperature,
and the distance of their hidden values (`--hidden`): the plan in the student's file says which channels these are.
Writes into out/: the loss of each step as CSV and PNG, a checkpoint, and the trained student as ONNX.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import numpy as np
import torch

from hyperclone_onnx import shrink
from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.torch import load, load_teacher


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("teacher", nargs="?", type=Path, default=common.SMALL, help="an ONNX model over bytes")
    parser.add_argument("--student", type=Path, help="a smaller one (default: the teacher at half its widths)")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--hidden", type=float, default=1.0, help="the weight of hidden values")
    parser.set_defaults(rate=1e-3)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student_path = options.student or student_of(options.teacher, options)
    teacher = load_teacher(options.teacher, student=student_path, device=device)
    student = load(student_path, device=device, values=teacher.values)
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.rate, weight_decay=0.0)
    losses: list[float] = []
    checkpoint = options.output / "distill.pt"
    if options.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        student.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    def save() -> None:
        state = {"model": student.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    steps = options.steps - len(losses)
    for inputs, _ in common.progress(common.batches(options, len(losses)), steps):
        ids = torch.from_numpy(inputs).to(device)
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        outputs, targets = student(**feeds), teacher(**feeds)
        loss = teacher.loss(outputs, targets, temperature=options.temperature, hidden=options.hidden)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 25 == 0 or len(losses) == options.steps:
            save()
    common.draw_losses(losses, options.output / "distill_losses.csv")
    result = absorb(student_path, student.state_dict(), options.output / "distill_trained.onnx")
    print(f"{options.output / 'distill_trained.onnx'}: {len(result.replaced)} tensors replaced")


def student_of(teacher: Path, options: argparse.Namespace) -> Path:
    """The teacher at half its widths: the parts that matter most on one batch of bytes."""
    path: Path = options.output / "student.onnx"
    if not path.exists():
        inputs, _ = next(common.batches(options))
        data = {"input_ids": np.ascontiguousarray(inputs), "attention_mask": np.ones_like(inputs)}
        shrink(teacher, path, factor=0.5, method="importance", data=data, check=False)
    return path


if __name__ == "__main__":
    main()
