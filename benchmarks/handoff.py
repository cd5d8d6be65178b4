"""Measures the time of a training step: of a model that `handoff` loads, and of the Hugging Face model it comes from.

    python benchmarks/handoff.py [--model llama|gpt2|bert] [--dtype float32|bfloat16] [--hidden 256] [--layers 4]
                                 [--no-compile] [--no-jax] [--write]

A step is the forward pass, the backward pass and AdamW. All models have the same weights and the same batch. Their
steps alternate in one run, so that other load on the machine slows all of them. bfloat16 is PyTorch's autocast. Prints
a Markdown table; --write puts it into docs/benchmarks.md. Uses a GPU if there is one. Needs torch, transformers, jax
and optax.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "models")]

import build  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from pages import put  # noqa: E402

from hyperclone_onnx.frameworks.torch import load  # noqa: E402

Step = Callable[[], float]
RATE = 1e-4
INPUTS = ("input_ids", "attention_mask")
EAGER, COMPILED, JITTED = "eager", "torch.compile", "jax.jit"
SOURCE, HANDOFF = "Hugging Face", "handoff"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("batch", 4), ("length", 128), ("steps", 20), ("vocab", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-jax", action="store_true", help="leave JAX out")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    return parser.parse_args()


def llama(arguments: argparse.Namespace) -> Any:
    """A Llama: rotary positions, grouped queries, RMS norms, a gated feed-forward."""
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=8 * arguments.hidden // 3 // 8 * 8,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        num_key_value_heads=arguments.hidden // 64,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2(arguments: argparse.Namespace) -> Any:
    """A GPT-2: learned positions, layer norms, one fused projection, a tied head."""
    sizes = {
        "vocab_size": arguments.vocab,
        "n_embd": arguments.hidden,
        "n_layer": arguments.layers,
        "n_positions": arguments.length,
    }
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **dropout, n_head=arguments.hidden // 32, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


def bert(arguments: argparse.Namespace) -> Any:
    """A BERT: attention in both directions, layer norms behind the sums."""
    config = transformers.BertConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 32,
        max_position_embeddings=arguments.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


MODELS: dict[str, Callable[[argparse.Namespace], Any]] = {"llama": llama, "gpt2": gpt2, "bert": bert}


def source_model(arguments: argparse.Namespace) -> Any:
    """The model with random weights. Gains and biases are random too, because an export stores equal ones only once."""
    torch.manual_seed(0)
    model = MODELS[arguments.model](arguments).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.1)
    return model


def torch_step(arguments: argparse.Namespace, call: Callable[[], Any], model: Any, targets: Any) -> Step:
    """Forward, backward and AdamW in PyTorch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    narrow = arguments.dtype == "bfloat16"

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(targets.device.type, torch.bfloat16) if narrow else contextlib.nullcontext():
            loss = torch.nn.functional.cross_entropy(call()[:, :-1].flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def jax_step(path: Path, ids: Any, mask: Any) -> Step:
    """The same step in JAX, jitted as a whole."""
    import jax
    import jax.numpy as jnp
    import optax

    from hyperclone_onnx.frameworks.jax import load as load_function

    apply, params = load_function(path)
    ids, mask = ids.cpu().numpy(), mask.cpu().numpy()
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    state: dict[str, Any] = {"params": params, "moments": optimizer.init(params)}

    @jax.jit
    def whole(params: Any, moments: Any) -> Any:
        def loss_of(params: Any) -> Any:
            chances = jax.nn.log_softmax(apply(params, ids, mask)[:, :-1])
            return -jnp.take_along_axis(chances, ids[:, 1:, None], axis=-1).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    def step() -> float:
        state["params"], state["moments"], loss = whole(state["params"], state["moments"])
        return float(jax.block_until_ready(loss))

    return step


def main() -> None:
    """Measure the steps of all variants in turn."""
    arguments = options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = source_model(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        source.set_attn_implementation("eager")
        build.export_onnx(source, INPUTS, "logits", path, arguments.length)
        source.set_attn_implementation("sdpa")
        ids = torch.randint(0, arguments.vocab, (arguments.batch, arguments.length), device=device)
        mask, targets = torch.ones_like(ids), ids[:, 1:].contiguous()
        steps: dict[tuple[str, str], Step] = {}
        for way in (EAGER,) if arguments.no_compile else (EAGER, COMPILED):
            # A step changes the weights, so that every variant needs a copy of them.
            original, handed = source_model(arguments).to(device), load(path, device=device)
            original.set_attn_implementation("sdpa")
            call_original, call_handed = (
                (original, handed) if way == EAGER else (torch.compile(original), torch.compile(handed))
            )
            steps[SOURCE, way] = torch_step(
                arguments, lambda call=call_original: call(input_ids=ids, attention_mask=mask).logits, original, targets
            )
            steps[HANDOFF, way] = torch_step(arguments, lambda call=call_handed: call(ids, mask), handed, targets)
        if not arguments.no_jax and arguments.dtype == "float32":
            steps[HANDOFF, JITTED] = jax_step(path, ids, mask)
        lines = list(report(arguments, device, steps))
    print("\n".join(lines))
    if arguments.write:
        put("benchmarks.md", f"handoff {arguments.model} {arguments.dtype}", "\n".join(lines))


def report(arguments: argparse.Namespace, device: str, steps: dict[tuple[str, str], Step]) -> Iterator[str]:
    """Run all steps in turn, and report the median time of each and its ratio to Hugging Face's in the same turn."""
    losses = {key: step() for key, step in steps.items()}
    for step in list(steps.values()) * 2:  # compilers may compile again in the second and third step
        step()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(arguments.steps):
        for key, step in steps.items():
            begin = time.perf_counter()
            step()
            times[key].append(time.perf_counter() - begin)
    size = f"hidden {arguments.hidden}, {arguments.layers} layers, batch {arguments.batch} x {arguments.length}"
    where = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    yield f"{arguments.model}, {size}, {arguments.dtype}, {where}; {arguments.steps} steps of each in turn."
    yield ""
    yield "| | ms per step (median) | fastest | of Hugging Face's: median | fastest by fastest | first loss |"
    yield "|---|---|---|---|---|---|"
    for (who, way), seconds in times.items():
        reference = times.get((SOURCE, way if way != JITTED else COMPILED)) if who == HANDOFF else None
        ratios = ["", ""]
        if reference is not None:
            turns = [own / first for own, first in zip(seconds, reference, strict=True)]
            ratios = [f"{statistics.median(turns):.2f}", f"{min(seconds) / min(reference):.2f}"]
        median, fastest = 1000 * statistics.median(seconds), 1000 * min(seconds)
        yield f"| {who}, {way} | {median:.1f} | {fastest:.1f} | {ratios[0]} | {ratios[1]} | {losses[who, way]:.5f} |"


if __name__ == "__main__":
    main()
