"""Measures whether a grown model learns sooner than a model with random initial weights.

    python benchmarks/growth.py --quick | --full | --large [--gpu]
        [--output DIR] [--workers N] [--steps N] [--write]

It trains a small model, grows it with `expand`, loads it with `frameworks.torch.load` and trains it further. It also
trains the same large model from random weights. All runs read the same bytes in the same order. The benchmark prints a
table for each question, and writes report.md, results.json, curves.csv, random.csv (the curves from random weights,
for `hyperclone-onnx forecast`) and pictures into DIR. After an interruption, the same command continues.

--quick takes about ten minutes on two cores, --full a few hours. --large has a BPE vocabulary. It asks for the
cheapest growth, for other ways to grow (each tensor's settings, AKI, any size, depth, experts) and for growth in
stages. It shows how the gain moves with the size, from 0.08 to 3.4 M weights. It takes about two hours on two cores;
with --gpu it runs on an NVIDIA GPU. --gpu alone is a study of its own, of 8 layers and width 1024. Needs torch, jax,
optax, matplotlib and, for --large, tokenizers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from growing.checks import checks  # noqa: E402
from growing.figures import draw, draw_series  # noqa: E402
from growing.findings import report, title, write_curves, write_json, write_random  # noqa: E402
from growing.progress import progress  # noqa: E402
from growing.runs import Lab, Settings  # noqa: E402
from growing.study import ALL, LARGE, Findings, Size, Study  # noqa: E402
from pages import put  # noqa: E402

PICTURES = ("strategy", "strategy_whole", "unannealed", "cheapest", "ways", "stages", "series")
SIZES = {
    "quick": Size("quick", 32, 1000, grown_rates=(3e-3, 6e-3), source_part=1.5, questions=("strategy", "small")),
    "full": Size("full", 32, 1500, rates=(4e-3, 8e-3, 1.1e-2, 1.6e-2), questions=ALL),
    "large": Size(
        "large",
        64,
        1000,
        vocabulary=1024,
        batch=16,
        rates=(3e-3, 6e-3, 1.2e-2),
        source_rates=(6e-3, 1.2e-2),
        grown_rates=(2e-3, 4e-3),
        source_part=1.0,
        strategies=("symmetric", "noisy-diagonal"),
        questions=LARGE,
        series=(256, 128, 64, 32),
    ),
    "gpu": Size(
        "gpu",
        512,
        10_000,
        layers=8,
        length=512,
        batch=32,
        rates=(3e-4, 6e-4, 1.2e-3, 2.4e-3),
        source_rates=(1.2e-3, 2.4e-3),
        grown_rates=(1e-4, 2e-4, 4e-4),
        questions=tuple(question for question in ALL if question != "framework"),
        device="cuda",
    ),
}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    for name in ("quick", "full", "large"):
        which.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument("--gpu", action="store_true", help="with --large: on an NVIDIA GPU; alone: a study for a GPU")
    parser.add_argument("--output", type=Path, help="default: out/growth-SIZE")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at the same time; a run uses one thread")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/growth.md")
    parser.add_argument("--steps", type=int, help="steps of the model from random weights; others scale with it")
    arguments = parser.parse_args()
    size = SIZES[arguments.size or ("gpu" if arguments.gpu else "quick")]
    if arguments.gpu and size.name not in ("gpu", "large"):
        parser.error("--gpu: alone, or with --large")
    if arguments.gpu:
        size = replace(size, device="cuda")
    if arguments.steps is not None:
        if arguments.steps < size.evaluations:
            parser.error(f"--steps: at least {size.evaluations}")
        size = replace(size, steps=arguments.steps)
    if size.device == "cuda" and not torch.cuda.is_available():
        parser.error("--gpu needs an NVIDIA GPU, and PyTorch sees none: see --full")
    folder: Path = arguments.output or Path("out") / f"growth-{size.name}"
    folder.mkdir(parents=True, exist_ok=True)
    workers = 1 if size.device == "cuda" else arguments.workers
    try:
        with progress() as show:
            lab = Lab(folder, Settings(size.batch, size.evaluations, size.examined, size.device), workers, show)
            for findings in Study(lab, size).answers():
                write(findings, lab, folder)
    except KeyboardInterrupt:
        print("interrupted: run the same command to continue", file=sys.stderr)
        return 130
    text = report(findings, lab)
    print(text)
    if arguments.write:
        put("growth.md", f"growth {size.name}", _with_pictures(text, folder, size))
    all_checks = list(checks(findings, lab))
    for check in all_checks:
        print(f"{'ok' if check.holds else 'FAILED'}: {check.statement} ({check.measured})")
    print(f"tables, curves and pictures are in {folder}")
    return 0 if all(check.holds for check in all_checks) else 1


def _with_pictures(text: str, folder: Path, size: Size) -> str:
    """The report with the most important pictures, which are copied into docs/."""
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            picture, heading = f"growth-{size.name}-{name}.png", title(name, size.unit)
            shutil.copyfile(folder / f"{name}.png", ROOT / "docs" / picture)
            text = text.replace(f"### {heading}\n", f"### {heading}\n\n![{heading}]({picture})\n")
    return text


def write(findings: Findings, lab: Lab, folder: Path) -> None:
    """Write all results so far."""
    (folder / "report.md").write_text(report(findings, lab), encoding="utf-8")
    write_json(findings, folder / "results.json")
    write_curves(lab.outcomes.values(), lab, folder / "curves.csv")
    write_random(lab.outcomes.values(), lab, folder / "random.csv")
    name, rows = list(findings.tables.items())[-1]
    if name == "series":
        draw_series(rows, findings.size.unit, folder / f"{name}.png")
    else:
        draw(rows, findings.baseline, findings.target, lab, folder / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
