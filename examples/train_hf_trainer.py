"""Train a small Llama with transformers.Trainer, grow it, and train on with the same Trainer.

    python examples/train_hf_trainer.py [--steps 50] [--resume]

The small model is made here and trained for as many steps, exported to ONNX and grown; `handoff --to hf` grows its own
checkpoint by the same plan. Writes into out/: both checkpoints, the loss of each step as CSV and PNG, and the trained
model as ONNX.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import common
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback

from hyperclone_onnx import expand
from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.exports import hand_over

sys.path.insert(0, str(common.ROOT / "models"))
import build

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "logits"


class Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """The same random windows of bytes as in the other examples."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows = [row for inputs, targets in common.batches(options) for row in zip(inputs, targets, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, targets = (torch.from_numpy(array) for array in self.rows[index])
        # The library shifts the labels by one itself.
        return {
            "input_ids": torch.cat([inputs, targets[-1:]]),
            "attention_mask": torch.ones(len(inputs) + 1, dtype=torch.int64),
            "labels": torch.cat([inputs, targets[-1:]]),
        }


class InOrder(Trainer):
    """A Trainer that takes the windows in order, like the other examples."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class Bar(ProgressCallback):
    """A callback that shows a progress bar only: the losses are drawn at the end."""

    def on_log(self, *_: Any, **__: Any) -> None:
        pass


def train(model: PreTrainedModel, options: argparse.Namespace, folder: Path, resume: bool) -> list[float]:
    """Train a model, write its checkpoints into a folder, and return the loss of each step."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_steps=25,
        save_total_limit=1,
        seed=options.seed,
        report_to=[],
    )
    trainer = InOrder(model=model, args=settings, train_dataset=Windows(options))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def small_model(options: argparse.Namespace, folder: Path) -> Path:
    """Train a Llama over bytes; return its checkpoint and its ONNX file."""
    set_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    losses = train(model, argparse.Namespace(**{**vars(options), "rate": 3e-3}), folder / "checkpoints", False)
    common.draw_losses(losses, folder.parent / "hf_small_losses.csv")
    model.cpu().save_pretrained(folder)
    build.export_onnx(model, INPUTS, OUTPUT, folder / "small.onnx", config.max_position_embeddings)
    return folder / "small.onnx"


def main() -> None:
    options = common.parser(__doc__).parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    small, big, grown = (options.output / name for name in ("hf_small", "hf_big.onnx", "hf_big"))
    if not options.resume:
        for folder in (small, grown, options.output / "hf_run"):
            shutil.rmtree(folder, ignore_errors=True)
        onnx = small_model(options, small)
        expand(onnx, big, 2)
        hand_over(big, "hf", grown, like=small, source=onnx)
    model = AutoModelForCausalLM.from_pretrained(grown)
    losses = train(model, options, options.output / "hf_run", options.resume)
    common.draw_losses(losses, options.output / "hf_losses.csv")
    trained = options.output / "hf_trained"
    shutil.copytree(grown, trained, dirs_exist_ok=True)  # also the file that maps tensors to initializers
    model.cpu().save_pretrained(trained)
    result = absorb(big, trained, options.output / "hf_trained.onnx")
    print(f"{options.output / 'hf_trained.onnx'}: {len(result.replaced)} tensors replaced")


if __name__ == "__main__":
    main()
