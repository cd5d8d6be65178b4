"""Train a byte-level GPT on the Python standard library's source text and export it to ONNX.

    python models/tiny_gpt/train.py --steps 3200

Writes ``tiny_gpt.onnx`` and a ``README.md`` with the numbers measured in this very run.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import build
from corpus import read_corpus

CONTEXT = 256
BATCH = 16
PEAK_RATE = 3e-3
WARM_UP = 200
WEIGHT_DECAY = 0.1
INPUTS = ("input_ids", "attention_mask")
PROMPTS = ("def main(", "class Parser:\n    def __init__(self", "import ")
PIP_LINE = "pip install torch transformers rich onnx onnx-ir onnxscript onnxruntime"


def new_model() -> Any:
    """An untrained GPT-2 of 0.86 M parameters over bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own GELU, in one operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    warm_up = min(WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return PEAK_RATE * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return PEAK_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: Any, text: bytes, steps: int, seed: int, bf16: bool) -> None:
    """AdamW on random windows of ``text``; matrices decay, biases and norms do not."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    offsets = torch.arange(CONTEXT + 1)
    model.train()
    console = Console(stderr=True)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.log(256))
        smoothed = math.log(256)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps)
            starts = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
            window = data[starts + offsets].long()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(window[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            smoothed += 0.02 * (loss.item() - smoothed)
            progress.update(task, advance=1, loss=smoothed)
            if not console.is_terminal and (step + 1) % 100 == 0:
                console.print(f"step {step + 1}/{steps} loss {smoothed:.3f} nats per byte")
    model.eval()


def windows(text: bytes) -> Iterator[Any]:
    """``text`` in batches of windows. Windows overlap by one byte, which is predicted but not read."""
    import torch

    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    yield from data.unfold(0, CONTEXT + 1, CONTEXT).split(64)


def validation_loss(model: Any, text: bytes) -> float:
    """Mean nats per byte over all of ``text``, in windows of the full context, in float32."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for window in windows(text):
            logits = model(window[:, :-1]).logits.flatten(0, 1)
            targets = window[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += targets.numel()
    return total / count


def check_batches(text: bytes) -> list[dict[str, Any]]:
    """Inputs to compare ONNX Runtime with torch on: full context, one byte, and a padded batch."""
    import numpy as np

    data = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    batches = []
    for lengths in ([CONTEXT], [1], [40, 17, 3]):
        ids = np.zeros((len(lengths), max(lengths)), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, :length] = data[row * CONTEXT : row * CONTEXT + length]
            mask[row, :length] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def continue_prompt(path: Path, prompt: str, steps: int) -> str:
    """``prompt``, continued by ``steps`` bytes; each is the most probable one in ONNX Runtime."""
    import numpy as np
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = list(prompt.encode())
    for _ in range(steps):
        window = np.array([ids[-CONTEXT:]], dtype=np.int64)
        (logits,) = session.run(["logits"], {"input_ids": window, "attention_mask": np.ones_like(window)})
        ids.append(int(logits[0, -1].argmax()))
    return bytes(ids).decode(errors="replace")


README = """\
# tiny_gpt

A byte-level GPT-2 trained on the source text of Python's own standard library: small enough to keep in the
repository and to train on a CPU in minutes, yet a real trained model.

| | |
|---|---|
| file | `{file}` ({size:.2f} MB, ONNX, weights inside) |
| parameters | {parameters:,} (4 layers, width 128, 4 heads, context {context}, tied embeddings) |
| inputs | `input_ids`, `attention_mask`: int64 `[batch, sequence]`; a token is a byte (0-255) |
| output | `logits`: float32 `[batch, sequence, 256]` |
| corpus | standard library of Python {python}, `*.py` without tests and generated tables: \
{train_files} files, {train_bytes:,} bytes |
| validation | {validation_files} files held out by a hash of their names, {validation_bytes:,} bytes |
| training | {steps:,} steps of {batch} windows of {context} bytes = {tokens:,} bytes seen, seed {seed} |
| optimiser | AdamW, peak rate {rate}, {warm_up} warm-up steps then cosine, weight decay {decay}, \
no dropout, {precision} |
| validation loss | **{loss:.4f} nats per byte = {bits:.4f} bits per byte** (float32, windows of {context}) |
| ONNX Runtime | differs from torch by {error:.1e} of the largest logit |
| time | {minutes:.1f} minutes of training, CPU threads: {threads} |

Files follow one another in the corpus, each after a zero byte; so a zero byte starts a new file.

## Greedy continuations

Each by ONNX Runtime, taking the likeliest byte at every step; a model this small
soon repeats itself when it never samples:

{samples}
## Train it again

```
{pip}
python models/tiny_gpt/train.py --steps {steps} --seed {seed}{flag}
```

The corpus is the standard library of the Python that runs the script, so another version of Python, or of
torch, gives slightly different weights.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a byte-level GPT and export it to ONNX.")
    parser.add_argument("--steps", type=int, default=3200, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16: faster where the CPU has it")
    default = Path(__file__).with_name("tiny_gpt.onnx")
    parser.add_argument("--output", type=Path, default=default, help="the ONNX file to write")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        import onnxruntime  # noqa: F401  (needed only after the training: fail before it)
        import onnxscript  # noqa: F401
        import torch

        torch.manual_seed(args.seed)
        model = new_model()
        import rich  # noqa: F401
    except ImportError as missing:
        print(f"error: {missing}; this script needs: {PIP_LINE}", file=sys.stderr)
        return 1

    corpus = read_corpus()
    started = time.perf_counter()
    train(model, corpus.train, args.steps, args.seed, args.bf16)
    minutes = (time.perf_counter() - started) / 60
    loss = validation_loss(model, corpus.validation)
    print(f"validation loss {loss:.4f} nats per byte, {loss / math.log(2):.4f} bits per byte")

    model.set_attn_implementation("eager")
    build.export_onnx(model, INPUTS, "logits", args.output, CONTEXT)
    error = build.verify(model, args.output, "logits", check_batches(corpus.validation))
    print(f"{args.output}: largest difference from torch {error:.1e} (relative)")
    if error > build.TOLERANCE:
        print(f"error: ONNX Runtime differs from torch by {error:.1e}", file=sys.stderr)
        return 1
    samples = ""
    for prompt in PROMPTS:
        text = continue_prompt(args.output, prompt, 160)
        samples += f"```python\n{text.rstrip()}\n```\n\n"
    readme = README.format(
        file=args.output.name,
        size=args.output.stat().st_size / 1e6,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context=CONTEXT,
        python=platform.python_version(),
        train_files=corpus.train_files,
        train_bytes=len(corpus.train),
        validation_files=corpus.validation_files,
        validation_bytes=len(corpus.validation),
        steps=args.steps,
        batch=BATCH,
        tokens=args.steps * BATCH * CONTEXT,
        seed=args.seed,
        rate=PEAK_RATE,
        warm_up=WARM_UP,
        decay=WEIGHT_DECAY,
        precision="bfloat16 autocast" if args.bf16 else "float32",
        loss=loss,
        bits=loss / math.log(2),
        error=error,
        minutes=minutes,
        threads=torch.get_num_threads(),
        samples=samples,
        pip=PIP_LINE,
        flag=" --bf16" if args.bf16 else "",
    )
    args.output.with_name("README.md").write_text(readme, encoding="utf-8")
    print(samples)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
