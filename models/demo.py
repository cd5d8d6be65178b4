"""Grow the committed byte-level GPT; then let the source and the grown model continue the same prompts.

python models/demo.py [--factor 2] [--output out/tiny_gpt_x2.onnx]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

SOURCE = Path(__file__).resolve().parent / "tiny_gpt" / "tiny_gpt.onnx"
PROMPTS = ("def main(", "class Parser:\n    def __init__(self, ", "import ")


def greedy(path: Path, prompt: str, steps: int) -> str:
    """The prompt, continued by `steps` bytes; each byte is the most probable one."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids = list(prompt.encode())
    for _ in range(steps):
        tokens = np.array([ids], dtype=np.int64)
        (logits,) = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        ids.append(int(np.asarray(logits)[0, -1].argmax()))
    return bytes(ids).decode(errors="replace")


def main() -> int:
    """Grow the model, then compare the continuations. Return 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("out/tiny_gpt_big.onnx"))
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    command = ["expand", str(SOURCE), "--factor", str(options.factor), "-o", str(options.output)]
    print("$ hyperclone-onnx", *command, flush=True)
    code = subprocess.run([sys.executable, "-m", "hyperclone_onnx", *command], check=False).returncode
    if code:
        return code
    same = True
    for prompt in PROMPTS:
        small, big = (greedy(path, prompt, options.steps) for path in (SOURCE, options.output))
        same = same and small == big
        print(f"\n--- {prompt!r}: source and grown model {'continue alike' if small == big else 'DIFFER'}")
        print(small if small == big else f"source: {small}\ngrown:  {big}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
