"""Make a mixture of experts of a dense model, train it in PyTorch with balanced experts, and take it back into ONNX.

    python examples/train_moe_torch.py [--steps 50] [--balance 0.01]

Writes into out/: the mixture, the loss of each step as CSV and PNG, and the trained mixture as ONNX. Without a loss for
the balance, a router may learn to choose the same few experts for all tokens. The loss here is that of the Switch
Transformer (arXiv 2101.03961): the number of experts, times the sum over the experts of the part of the choices that
an expert gets, times its mean probability. It is 1 if all experts are chosen equally often.
"""

from __future__ import annotations

from pathlib import Path

import common
import torch

from hyperclone_onnx import Experts, expand
from hyperclone_onnx.frameworks.absorb import absorb
from hyperclone_onnx.frameworks.torch import load

EXPERTS, CHOSEN = 8, 2


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--balance", type=float, default=0.01, help="the factor of the loss for the balance")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    mixture = options.output / "tiny_gpt_moe.onnx"
    make(mixture)
    model = load(mixture, router_logits=True)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=options.rate, weight_decay=0.0)
    losses: list[float] = []
    scores: list[torch.Tensor] = []
    for inputs, targets in common.progress(common.batches(options), options.steps):
        ids, labels = torch.from_numpy(inputs), torch.from_numpy(targets)
        logits, *scores = model(input_ids=ids, attention_mask=torch.ones_like(ids)).values()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        balance = torch.stack([balance_of(some) for some in scores]).mean()
        (loss + options.balance * balance).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    common.draw_losses(losses, options.output / "moe_torch_losses.csv")
    for layer, some in enumerate(scores):
        used = torch.bincount(chosen(some).flatten(), minlength=EXPERTS) / chosen(some).numel()
        print(f"layer {layer}: the experts get {', '.join(f'{part:.0%}' for part in used.tolist())} of the choices")
    result = absorb(mixture, model.state_dict(), options.output / "moe_torch_trained.onnx")
    print(f"{options.output / 'moe_torch_trained.onnx'}: {len(result.replaced)} tensors replaced")


def make(path: Path) -> None:
    """The committed model with experts. Half of the hidden units of each are drawn anew, so that the experts differ."""
    if not path.exists():
        expand(common.SMALL, path, experts=Experts(EXPERTS, CHOSEN, redraw=0.5), allow_change=True, check=False)


def chosen(scores: torch.Tensor) -> torch.Tensor:
    """The experts that are chosen for each token, (tokens, chosen)."""
    return scores.flatten(0, -2).topk(CHOSEN).indices


def balance_of(scores: torch.Tensor) -> torch.Tensor:
    """The loss for the balance of one layer."""
    counts = torch.bincount(chosen(scores).flatten(), minlength=EXPERTS)
    chances = scores.flatten(0, -2).softmax(dim=-1).mean(dim=0)
    return EXPERTS * (counts / counts.sum() * chances).sum()


if __name__ == "__main__":
    main()
