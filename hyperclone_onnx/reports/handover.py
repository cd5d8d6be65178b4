"""The report of `handoff --to`: what was written, and the Python lines that load it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyperclone_onnx.frameworks.exports import CHECKPOINT, HandedOver
from hyperclone_onnx.reports.tables import print_line


def print_handover(console: Any, model: Path, result: HandedOver) -> None:
    """Print what was written, how it was validated, and how to load and train it."""
    by = f", written by {result.processes} processes" if result.processes > 1 else ""
    console.print(f"{result.folder}: {result.tensors} tensors, {result.parameters:,} parameters{by}")
    if result.hugging_face:
        _print_hugging_face(console, result.hugging_face)
    elif result.validated_by:
        console.print(f"validated: in {result.validated_by} it computes the same as {model} in ONNX Runtime")
    elif not any(note.startswith("not validated") for note in result.notes):
        console.print("not validated")
    for note in result.notes:
        print_line(console, note)
    if result.optimizer:
        _print_optimizer(console, result.optimizer)
    if result.teacher:
        _print_teacher(console, result.teacher)
    console.print("load it with")
    for line in go_on(model, result):
        console.print(f"    {line}")
    for line in () if result.training is None else result.training.lines():
        print_line(console, line)


def _print_hugging_face(console: Any, report: dict[str, Any]) -> None:
    for name, (before, after) in report["config"].items():
        console.print(f"config.json: {name} {before} -> {after}")
    for name, what in report["compensations"].items():
        console.print(f"compensated: {name}: {what}")
    for name, why in report["repeated"].items():
        console.print(f"repeated: {name}: {why}")
    for note in report["notes"]:
        console.print(f"note: {note}")
    console.print(f"weights: {report['dtype']}, {', '.join(report['weights'])}")
    if report["tensors_checked"]:
        against = "the ONNX file's" if report["trained"] else "the source's; repeats were added up"
        console.print(f"checked: {report['tensors_checked']} tensors, read back from the files, against {against}")
    errors = []
    if report["error_to_source"] is not None:
        to_source = f"{report['error_to_source']:.1e} from the source checkpoint"
        errors.append(f"{to_source} (tolerance {report['tolerance']:.1e})")
    if report["error_to_file"] is not None:
        errors.append(f"{report['error_to_file']:.1e} from the ONNX file (tolerance {report['file_tolerance']:.1e})")
    on = f" on {'; '.join(report['cases'])}" if report["cases"] else ""
    console.print(f"validated: relative errors {', '.join(errors)}{on}")


def _print_optimizer(console: Any, state: dict[str, Any]) -> None:
    how = "exactly" if state["exact"] else f"{len(state['mean'])} of them as the mean over their repeats"
    new = f"; {len(state['new'])} are of new layers and begin at zero" if state["new"] else ""
    console.print(f"{state['file']}: moments of {state['tensors']} tensors after {state['steps']:g} steps, {how}{new}")


def _print_teacher(console: Any, teacher: dict[str, Any]) -> None:
    compared = [f"{len(teacher[kind])} {name}" for kind, name in (("logits", "logits"), ("hidden", "hidden values"))]
    console.print(f"teacher: {teacher['model']}: {' and '.join(compared)} are compared")
    for note in teacher["notes"]:
        print_line(console, f"note: {note}")


def go_on(model: Path, result: HandedOver) -> Iterator[str]:
    """The Python lines that load what was written, for the framework it was written for."""
    folder = Path(result.folder)
    checkpoint = str(folder / CHECKPOINT)
    if result.target == "hf":
        name = _architecture(folder)
        yield f"from transformers import {name}"
        yield f"model = {name}.from_pretrained({str(folder)!r})"
        return
    framework = "jax" if result.target == "jax" else "torch"
    yield f"from hyperclone_onnx.frameworks.{framework} import load"
    targets = "apply, params" if framework == "jax" else "model"
    values = ""
    if result.teacher:
        yield f"from hyperclone_onnx.frameworks.{framework} import load_teacher"
        yield f"teacher = load_teacher(student={str(folder)!r})"
        values = ", values=teacher.values"
    grown = f", plan={result.plan!r}" if result.plan else ""
    yield f"{targets} = load({str(model)!r}{grown}{values})  # with shard=mesh each process loads only its own part"
    if result.target == "pytorch":
        yield f"torch.distributed.checkpoint.load({{'model': model.state_dict()}}, checkpoint_id={checkpoint!r})"
    elif result.target == "jax":
        path = str((folder / CHECKPOINT).resolve())
        yield f"params = orbax.checkpoint.StandardCheckpointer().restore({path!r}, params)"
    else:
        files = sorted(folder.glob("model*.safetensors"))
        for file in files:
            part = ", strict=False" if len(files) > 1 else ""
            yield f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}){part})"


def _architecture(folder: Path) -> str:
    """The name of the model's class, from the configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(next(iter(config.get("architectures") or ()), "AutoModel"))
