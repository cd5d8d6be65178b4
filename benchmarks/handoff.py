"""Time of a training step: a handed-over model beside the Hugging Face model that it was exported from.

    python benchmarks/handoff.py [--hidden 256] [--layers 4] [--no-compile]

Both have the same weights and see the same batch; their steps alternate in one run, so that a busy machine slows both.
Prints a Markdown table. Uses a GPU if there is one. Needs torch, transformers and jax.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))

import build  # noqa: E402
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Step = Callable[[], float]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("batch", 4), ("length", 128), ("steps", 20), ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


def hugging_face(given: argparse.Namespace) -> Any:
    """A Llama with random weights; its norms' gains differ, or equal ones would be stored once."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=given.vocab,
        hidden_size=given.hidden,
        intermediate_size=8 * given.hidden // 3 // 8 * 8,
        num_hidden_layers=given.layers,
        num_attention_heads=given.hidden // 32,
        num_key_value_heads=given.hidden // 64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.1)
    return model


def torch_step(call: Callable[[], Any], model: Any, ids: Any) -> Step:
    def step() -> float:
        model.zero_grad()
        logits = call()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.item()

    return step


def jax_step(path: Path, ids: Any, mask: Any) -> Step:
    import jax
    import jax.numpy as jnp

    from hyperclone_onnx.frameworks.jax import load as load_function

    apply, params = load_function(path)
    ids, mask = ids.cpu().numpy(), mask.cpu().numpy()

    @jax.jit
    def both(params: Any) -> Any:
        def loss_of(params: Any) -> Any:
            chances = jax.nn.log_softmax(apply(params, ids, mask)[:, :-1])
            return -jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()

        return jax.value_and_grad(loss_of)(params)

    return lambda: float(jax.block_until_ready(both(params))[0])


def main() -> None:
    given = options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = hugging_face(given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        source.set_attn_implementation("eager")
        build.export_onnx(source, ("input_ids", "attention_mask"), "logits", path, given.length)
        source.set_attn_implementation("sdpa")
        source, model = source.to(device), load(path, device=device)
        ids = torch.randint(0, given.vocab, (given.batch, given.length), device=device)
        mask = torch.ones_like(ids)
        steps = {
            "Hugging Face, eager": torch_step(lambda: source(ids, attention_mask=mask).logits, source, ids),
            "handoff, eager": torch_step(lambda: model(ids, mask), model, ids),
        }
        if not given.no_compile:
            fast_source, fast_model = torch.compile(source), torch.compile(model)
            steps |= {
                "Hugging Face, torch.compile": torch_step(
                    lambda: fast_source(ids, attention_mask=mask).logits, source, ids
                ),
                "handoff, torch.compile": torch_step(lambda: fast_model(ids, mask), model, ids),
            }
        steps["handoff, jax.jit"] = jax_step(path, ids, mask)
        report(given, device, steps)


def report(given: argparse.Namespace, device: str, steps: dict[str, Step]) -> None:
    """Run all steps in turn, and print the median of each and its ratio to the first of its kind."""
    losses = {name: step() for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in list(steps.values()) * 2:  # once more to warm up, and not to measure recompiling
        step()
    for _ in range(given.steps):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(each) for name, each in times.items()}
    size = f"hidden {given.hidden}, {given.layers} layers, batch {given.batch} x {given.length}"
    print(f"Llama, {size}, float32, {device}, {torch.get_num_threads()} threads; medians of {given.steps} steps\n")
    print("| | ms per step | of Hugging Face's | loss |\n|---|---|---|---|")
    for name, median in medians.items():
        beside = medians.get(name.replace("handoff", "Hugging Face"))
        ratio = f"{median / beside:.2f}" if beside is not None and name.startswith("handoff") else ""
        print(f"| {name} | {1000 * median:.1f} | {ratio} | {losses[name]:.5f} |")


if __name__ == "__main__":
    main()
