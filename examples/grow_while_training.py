"""Grow a model while it trains: twice as wide after a part of the steps, then deeper, in one process.

    python examples/grow_while_training.py [--steps 60] [--wider 0.4] [--deeper 0.7] [--layers 6] [--resume]

The rate falls linearly to 0 over all steps; growth does not change it. Writes into out/: the loss of each step as CSV
and PNG, checkpoints, and the trained model as ONNX. A growth at a part above 1 is left out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import common
import torch

from hyperclone_onnx.frameworks.stages import Training

DONE = "done.json"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--wider", type=float, default=0.4, help="the part of the steps after which all widths double")
    parser.add_argument("--deeper", type=float, default=0.7, help="the part of the steps after which layers are added")
    parser.add_argument("--layers", type=int, default=6, help="the number of layers from then on")
    parser.add_argument("--save-every", type=int, default=20, help="the number of steps between two checkpoints")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.output / "grow_while_training"
    losses: list[float] = []
    flops = 0.0
    if options.resume:
        *_, newest = complete(folder)
        training = Training.resume(newest, device=device)
        done = json.loads((newest / DONE).read_text())
        losses, flops = done["losses"], done["flops"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        training = Training.begin(common.SMALL, lr=options.rate, weight_decay=0.1, no_decay=["*bias*"], device=device)
    growths = {
        round(options.wider * options.steps): {"factor": 2},
        round(options.deeper * options.steps): {"layers": options.layers},
    }
    first = len(losses)
    batches = common.progress(common.batches(options, first), options.steps - first)
    for step, (inputs, targets) in enumerate(batches, first):
        if step in growths:
            training = training.grow(**growths[step])
            print(f"step {step}: grown to {weights(training):,} weights")
        ids, labels = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
        training.set_rate(options.rate * (1.0 - step / options.steps))
        logits = training.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        training.clip(1.0)
        training.optimizer.step()
        training.optimizer.zero_grad()
        losses.append(loss.item())
        flops += 6.0 * weights(training) * ids.numel()
        if len(losses) % options.save_every == 0:
            save(training, folder, losses, flops)
    common.draw_losses(losses, options.output / "grow_while_training_losses.csv")
    training.save(options.output / "grow_while_training.onnx")
    alone = 6.0 * weights(training) * options.steps * options.batch * options.length
    print(f"{flops:.3g} FLOPs in all; the last size alone would have taken {alone:.3g} for as many steps")


def complete(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the newest last."""
    files = folder.glob(f"*/{DONE}")
    return sorted((file.parent for file in files), key=lambda checkpoint: int(checkpoint.name))


def save(training: Training, folder: Path, losses: list[float], flops: float) -> None:
    """Write a checkpoint with the number of its steps as its name. The file DONE comes last; older checkpoints go."""
    older = complete(folder)
    checkpoint = folder / str(len(losses))
    shutil.rmtree(checkpoint, ignore_errors=True)  # an interrupted run may have left it without DONE
    folder.mkdir(exist_ok=True)
    training.save_checkpoint(checkpoint)
    (checkpoint / DONE).write_text(json.dumps({"losses": losses, "flops": flops}))
    for old in older:
        shutil.rmtree(old)


def weights(training: Training) -> int:
    return sum(parameter.numel() for parameter in training.model.parameters())


if __name__ == "__main__":
    main()
