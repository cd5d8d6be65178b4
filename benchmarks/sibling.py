"""Grows SmolLM2-135M to the shape of SmolLM2-360M, and shows that both say the same.

    python benchmarks/sibling.py [--folder out/sibling] [--steps 20] [--write]

The weights come from a package (see models/build.py). The model grows twice: to sizes that are named, and to the sizes
of a config.json. The script compares the logits of both models and the texts with which they continue five prompts, and
counts the tensors that hold the vocabulary. Then it hands the grown model back to transformers, compares again, and
trains it for some steps. It ends with an error where a claim does not hold. --write puts the table into docs/sizes.md.
Needs torch, transformers and gguf, about 6 GB of memory, and as much space in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import build  # noqa: E402
from expand import Run, measured, table  # noqa: E402
from pages import put  # noqa: E402

SIZES = {"hidden": 960, "heads": 15, "kv_heads": 5, "ffn": 2560}
LAYERS = 32
CONFIG = {
    "hidden_size": 960,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "intermediate_size": 2560,
    "num_hidden_layers": LAYERS,
}
NEW_TOKENS = 32
TRAINED_TEXTS, TRAINED_TOKENS = 2, 16
TOLERANCE = 1e-5
RATE = 1e-4

Array = npt.NDArray[Any]


def prepare(folder: Path) -> Path:
    """Build the source: a Hugging Face checkpoint in `folder`/hf, and its ONNX file beside the configuration."""
    path = folder / "onnx" / "model.onnx"
    if path.exists():
        return path
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    source = build.SOURCES["smollm2-135m"]
    model, tokenizer = source.load(build.find_weights(source, build.default_cache()))
    model = plain(model).eval()
    model.save_pretrained(folder / "hf")
    build.save_tokenizer(tokenizer, folder / "hf" / "tokenizer.json")
    build.export_onnx(model, source.inputs, source.output, path, model.config.max_position_embeddings)
    return path


def plain(model: Any) -> Any:
    """The same model without the notes of its GGUF file, with which transformers would not save it."""
    from transformers import AutoModelForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    settings["dtype"] = "float32"
    result = AutoModelForCausalLM.from_config(type(model.config)(**settings), attn_implementation="eager")
    result.load_state_dict(model.state_dict())
    return result


def command(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "hyperclone_onnx", *arguments]


def grow(model: Path, out: Path, *options: str | Path) -> Run:
    """Grow the model, with a full validation."""
    if not out.exists():
        return measured(
            command("expand", model, *options, "-o", out, "--device", "cpu", "--json"),
            out.parent,
            (out.parent / f"{out.stem}.json").open("wb"),
        )
    return Run(0.0, 0.0, 0.0)


def stored(path: Path) -> dict[str, ir.TensorProtocol]:
    """The stored tensors of a file, by name. None of them is read."""
    values = ir.load(path).graph.initializers
    return {name: value.const_value for name, value in values.items() if value.const_value is not None}


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two files store the same bytes under the same names."""
    left, right = stored(one), stored(other)
    return left.keys() == right.keys() and all(
        np.array_equal(tensor.numpy(), right[name].numpy()) for name, tensor in left.items()
    )


class Runner:
    """A model in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def logits(self, ids: Sequence[int]) -> Array:
        tokens = np.array([ids], dtype=np.int64)
        (logits,) = self.session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        return np.asarray(logits)

    def continued(self, ids: Sequence[int]) -> list[int]:
        """The tokens, and the most likely ones behind them."""
        result = list(ids)
        for _ in range(NEW_TOKENS):
            result.append(int(self.logits(result)[0, -1].argmax()))
        return result


def relative(want: Array, got: Array) -> float:
    return float(np.abs(want.astype(np.float64) - got).max() / np.abs(want).max())


def prompts(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in build.PROMPTS]


def train(folder: Path, texts: Sequence[Sequence[int]], steps: int) -> list[float]:
    """The losses of some AdamW steps on the beginnings of texts."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.train()
    batch = torch.tensor([text[:TRAINED_TOKENS] for text in texts[:TRAINED_TEXTS]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses)}: {losses[-1]:.3f}", flush=True)
    return losses


def claim(holds: bool, text: str) -> None:
    """Print a claim, and end the script where it does not hold."""
    print(f"{'ok' if holds else 'NO'}  {text}", flush=True)
    if not holds:
        raise SystemExit(f"this does not hold: {text}")


def compare_files(folder: Path, source: Path, big: Path) -> tuple[list[list[int]], list[Array], list[list[str]]]:
    """Compare both ONNX files: logits, texts and tied embeddings. Returns the texts and the source's logits."""
    begins = prompts(folder)
    small = Runner(source)
    texts = [small.continued(ids) for ids in begins]
    logits = [small.logits(ids) for ids in texts]
    del small
    grown = Runner(big)
    error = max(relative(want, grown.logits(ids)) for want, ids in zip(logits, texts, strict=True))
    claim(error <= TOLERANCE, f"the logits differ by {error:.1e}, relative to the largest")
    same = sum(grown.continued(ids) == text for ids, text in zip(begins, texts, strict=True))
    claim(same == len(texts), f"{same} of {len(texts)} prompts continue with the same {NEW_TOKENS} tokens")
    vocabulary = logits[0].shape[-1]
    tables = {
        name: tuple(tensor.shape) for name, tensor in stored(big).items() if vocabulary in tuple(tensor.shape.numpy())
    }
    claim(list(tables.values()) == [(vocabulary, SIZES["hidden"])], f"one tensor holds the vocabulary: {tables}")
    rows = [
        ["relative error of the logits", f"{error:.1e}"],
        [f"prompts that continue with the same {NEW_TOKENS} tokens", f"{same} of {len(texts)}"],
        ["tensors that hold the vocabulary", str(len(tables))],
    ]
    return texts, logits, rows


def compare_checkpoint(
    folder: Path, big: Path, texts: list[list[int]], logits: list[Array], steps: int
) -> list[list[str]]:
    """Hand the grown file back to transformers, compare the logits, and train."""
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = folder / "big-hf"
    options = ("--to", "hf", "--like", folder / "hf", "--source", folder / "onnx" / "model.onnx", "-o", checkpoint)
    run = measured(command("handoff", big, *options, "--json"), folder)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    claim(config["architectures"] == ["LlamaForCausalLM"], "the checkpoint is a LlamaForCausalLM")
    wrong = {name: config.get(name) for name, size in CONFIG.items() if config.get(name) != size}
    claim(not wrong, f"config.json has the sizes of the target{wrong or ''}")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    claim(model.lm_head.weight is model.model.embed_tokens.weight, "the embedding is tied")
    with torch.inference_mode():
        error = max(
            relative(want, model(input_ids=torch.tensor([ids])).logits.numpy())
            for want, ids in zip(logits, texts, strict=True)
        )
    claim(error <= TOLERANCE, f"the logits of transformers differ by {error:.1e}")
    losses = train(checkpoint, texts, steps)
    claim(
        all(np.isfinite(losses)) and losses[-1] < losses[0],
        f"{steps} steps: the loss is {losses[0]:.3f} at first, {losses[-1]:.3f} at last",
    )
    return [
        ["`handoff --to hf`", f"{run.seconds:.0f} s, {run.peak / 1e3:.1f} GB"],
        ["relative error of the checkpoint's logits, in transformers", f"{error:.1e}"],
        [f"loss at the first and at the last of {steps} steps of AdamW", f"{losses[0]:.2f}, {losses[-1]:.2f}"],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "sibling")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="put the table into docs/sizes.md")
    parser.add_argument("--no-handoff", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = prepare(folder)
    print(f"source: {source}", flush=True)
    target = folder / "target"
    target.mkdir(exist_ok=True)
    config = json.loads((folder / "hf" / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, **CONFIG}), encoding="utf-8")

    big, alike = folder / "big.onnx", folder / "alike.onnx"
    sizes = [part for name, size in SIZES.items() for part in ("--size", f"{name}={size}")]
    run = grow(source, big, *sizes, "--layers", str(LAYERS))
    print(f"grown in {run.seconds:.1f} s, with {run.peak:.0f} MB", flush=True)
    grow(source, alike, "--like", target)
    claim(same_tensors(big, alike), "--size and --like give the same tensors")
    for file in folder.glob("alike.onnx*"):
        file.unlink()
    texts, logits, rows = compare_files(folder, source, big)
    report = json.loads((folder / "big.json").read_bytes())
    parameters = report["parameters"]
    rows = [
        ["parameters", f"{parameters['before'] / 1e6:.1f} M -> {parameters['after'] / 1e6:.1f} M"],
        ["`expand`, with full validation", f"{run.seconds:.0f} s, {run.peak / 1e3:.1f} GB"],
        *rows,
    ]
    if not options.no_handoff:
        rows += compare_checkpoint(folder, big, texts, logits, options.steps)
    text = table([["measured on two cores", ""], *rows])
    print(text)
    if options.write:
        put("sizes.md", "sibling", text)


if __name__ == "__main__":
    main()
