"""Selective state spaces (Mamba): the recurrence by Scan and by Loop, with its states on the interface."""

from __future__ import annotations

from collections.abc import Callable

from models.built.common import HIDDEN, length, linear, rms_norm, silu
from models.built.graph import Graph

INNER, STATE, STEP_RANK, KERNEL = 80, 9, 7, 4


def causal_convolution(g: Graph, x: str, layer: int, name: str) -> str:
    """A convolution along time, channel by channel. Earlier values are an input, the last values an output."""
    past = g.input(f"past_conv.{layer}", "float", ("batch", INNER, KERNEL - 1))
    whole = g.Concat(past, g.Transpose(x, perm=[0, 2, 1]), axis=2)
    last = g.Slice(whole, [1 - KERNEL], [2**31], [2])
    g.output(last, f"present_conv.{layer}", "float", ("batch", INNER, KERNEL - 1))
    kernel = g.parameter(f"{name}.conv1d.weight", (INNER, 1, KERNEL), std=0.5)
    y = g.Conv(whole, kernel, g.parameter(f"{name}.conv1d.bias", (INNER,)), group=INNER)
    return silu(g, g.Transpose(y, perm=[0, 2, 1]))


def advance(g: Graph, state: str, step: str, x: str, write: str, read: str, decay: str) -> tuple[str, str]:
    """h' = exp(step A) h + step x B and y = h' C, at one time."""
    kept = g.Mul(g.Exp(g.Mul(g.Unsqueeze(step, [2]), decay)), state)
    new = g.Add(kept, g.Mul(g.Unsqueeze(g.Mul(step, x), [2]), g.Unsqueeze(write, [1])))
    return new, g.Squeeze(g.MatMul(new, g.Unsqueeze(read, [2])), [2])


def scanned(g: Graph, past: str, over: tuple[str, ...], decay: str, name: str) -> tuple[str, str]:
    """The recurrence as a Scan along time."""
    inner = Graph(g)
    state = inner.input("state_in", "float")
    now = [inner.input(f"{part}_now", "float") for part in ("step", "x", "write", "read")]
    new, y = advance(inner, state, *now, decay)
    inner.output(new, "state_out", "float")
    inner.output(y, "y_now", "float")
    return g.Scan(
        past,
        *over,
        outputs=2,
        body=inner.body(name),
        num_scan_inputs=4,
        scan_input_axes=[1] * 4,
        scan_output_axes=[1],
    )


def looped(g: Graph, past: str, over: tuple[str, ...], decay: str, name: str) -> tuple[str, str]:
    """The recurrence as a Loop over time steps, which takes each step by the number of the iteration."""
    inner = Graph(g)
    time = inner.input("time", "int64", ())
    go_on = inner.input("go_in", "bool", ())
    state = inner.input("state_in", "float")
    new, y = advance(inner, state, *(inner.Gather(sequence, time, axis=1) for sequence in over), decay)
    inner.output(go_on, "go_out", "bool", ())
    inner.output(new, "state_out", "float")
    inner.output(y, "y_now", "float")
    last, ys = g.Loop(length(g, over[0], 1), None, past, outputs=2, body=inner.body(name))
    return last, g.Transpose(ys, perm=[1, 0, 2])


def state_space(
    g: Graph, x: str, layer: int, recurrence: Callable[..., tuple[str, str]], normalised: bool = False
) -> str:
    """A Mamba block; with the ranks normalised in the middle it is Jamba's."""
    name = f"layers.{layer}.mixer"
    x, z = g.Split(linear(g, x, f"{name}.in_proj", HIDDEN, 2 * INNER), [INNER, INNER], outputs=2, axis=-1)
    x = causal_convolution(g, x, layer, name)
    ranks = linear(g, x, f"{name}.x_proj", INNER, STEP_RANK + 2 * STATE)
    step, write, read = g.Split(ranks, [STEP_RANK, STATE, STATE], outputs=3, axis=-1)
    if normalised:
        step = rms_norm(g, step, f"{name}.dt_layernorm", STEP_RANK)
        write = rms_norm(g, write, f"{name}.b_layernorm", STATE)
        read = rms_norm(g, read, f"{name}.c_layernorm", STATE)
    step = g.Softplus(linear(g, step, f"{name}.dt_proj", STEP_RANK, INNER, bias=True))
    decay = g.Neg(g.Exp(g.parameter(f"{name}.A_log", (INNER, STATE), std=0.5)))
    past = g.input(f"past_ssm.{layer}", "float", ("batch", INNER, STATE))
    last, y = recurrence(g, past, (step, x, write, read), decay, name)
    g.output(last, f"present_ssm.{layer}", "float", ("batch", INNER, STATE))
    y = g.Add(y, g.Mul(x, g.parameter(f"{name}.D", (INNER,), mean=1.0)))
    return linear(g, g.Mul(y, silu(g, z)), f"{name}.out_proj", INNER, HIDDEN)
