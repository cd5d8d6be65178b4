"""Checks whether activations move as far at every width: the coordinate check (Yang et al., arXiv 2203.03466, app. D).

    python benchmarks/coordinates.py [MODEL.onnx] [--factors 1 2 4 8] [--steps 5] [--plot docs/coordinates.png]

It grows MODEL (default: tiny_gpt) by each factor with the default strategy, and trains each model for a few steps of
AdamW on the same bytes. It measures how far the elements of each layer's output and of the logits have moved from their
values before training: the mean of the absolute difference. With one rate for all tensors the movement grows with the
width. With the settings of `adamw_groups` it stays. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hyperclone_onnx import expand
from hyperclone_onnx.frameworks.optimizer.groups import adamw_groups
from hyperclone_onnx.frameworks.torch import Block, load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from models.corpus import read_corpus  # noqa: E402

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
WAYS = ("one rate", "exact", "mup")
"""One rate for all tensors, and the two parametrisations of `adamw_groups`."""


def batches(steps: int, length: int = 64, rows: int = 8) -> Iterator[Any]:
    text = torch.frombuffer(bytearray(read_corpus().train[: 1 << 20]), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - length - 1, (rows,), generator=generator)
        yield torch.stack([text[start : start + length + 1] for start in starts])


def outputs(model: Any, ids: Any) -> list[Any]:
    """The output of each layer, and the logits."""
    values: list[Any] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: values.append(out[0].detach()))
        for module in model.modules()
        if isinstance(module, Block)
    ]
    with torch.no_grad():
        values.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    for hook in hooks:
        hook.remove()
    return values


def movements(path: Path, way: str, steps: int) -> list[tuple[float, float]]:
    """After each step, how far the layers' outputs and the logits have moved, as means over their elements."""
    model = load(path)
    parametrisation: Any = way
    groups = model.named_parameters() if way == "one rate" else None
    groups = groups or adamw_groups(model, **SETTINGS, parametrisation=parametrisation)
    optimizer = torch.optim.AdamW(groups, **SETTINGS)
    probe, *data = batches(steps + 1)
    before = outputs(model, probe[:, :-1])
    moved = []
    for ids in data:
        logits = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = outputs(model, probe[:, :-1])
        differences = [float((new - old).abs().mean()) for new, old in zip(after, before, strict=True)]
        moved.append((sum(differences[:-1]) / len(differences[:-1]), differences[-1]))
    return moved


def draw(results: dict[tuple[str, int], list[tuple[float, float]]], path: Path) -> None:
    """One panel for each way: how far the logits move, with a line for each factor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "one rate": "one rate: wider models move further",
        "exact": "exact: all widths move alike",
        "mup": "muP: all widths move alike",
    }
    figure, panels = pyplot.subplots(1, len(WAYS), figsize=(11, 3.6), sharey=True, layout="constrained")
    factors = sorted({factor for _, factor in results})
    for panel, way in zip(panels, WAYS, strict=True):
        for number, factor in enumerate(factors):
            curve = [0.0, *(logits for _, logits in results[way, factor])]
            color = pyplot.get_cmap("viridis")(0.85 * number / max(1, len(factors) - 1))
            panel.plot(range(len(curve)), curve, color=color, label=f"x{factor}")
        panel.set_title(titles[way], fontsize=10)
        panel.set_xlabel("steps of AdamW after growth")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean movement of a logit")
    panels[0].legend(title="width", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=ROOT / "models" / "tiny_gpt" / "tiny_gpt.onnx")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results = {}
    print("| width | " + " | ".join(f"{way}: layers | {way}: logits" for way in WAYS) + " |")
    print("|---|" + "---|---|" * len(WAYS))
    with tempfile.TemporaryDirectory() as folder:
        for factor in options.factors:
            path = Path(folder) / "grown.onnx"
            expand(options.model, path, factor, check=False)
            for way in WAYS:
                results[way, factor] = movements(path, way, options.steps)
            last = [results[way, factor][-1] for way in WAYS]
            print(f"| x{factor} | " + " | ".join(f"{layers:.4f} | {logits:.4f}" for layers, logits in last) + " |")
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
