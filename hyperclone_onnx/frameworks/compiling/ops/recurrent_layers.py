"""RNN, GRU and LSTM: layers whose state goes from step to step. Each direction runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperclone_onnx.errors import Refused
from hyperclone_onnx.frameworks.compiling.registry import Array, implements

Activation = Callable[[Any, Array, float, float], Array]

ACTIVATIONS: dict[str, tuple[Activation, float | None, float | None]] = {
    "affine": (lambda xp, x, a, b: a * x + b, 1.0, 0.0),
    "elu": (lambda xp, x, a, b: xp.where(x > 0, x, a * xp.expm1(xp.minimum(x, xp.zeros_like(x)))), 1.0, None),
    "hardsigmoid": (lambda xp, x, a, b: xp.clip(a * x + b, 0.0, 1.0), 0.2, 0.5),
    "leakyrelu": (lambda xp, x, a, b: xp.where(x >= 0, x, a * x), 0.01, None),
    "relu": (lambda xp, x, a, b: xp.relu(x), None, None),
    "scaledtanh": (lambda xp, x, a, b: a * xp.tanh(b * x), 1.0, 1.0),
    "sigmoid": (lambda xp, x, a, b: xp.sigmoid(x), None, None),
    "softplus": (lambda xp, x, a, b: xp.softplus(x), None, None),
    "softsign": (lambda xp, x, a, b: x / (1 + xp.abs(x)), None, None),
    "tanh": (lambda xp, x, a, b: xp.tanh(x), None, None),
    "thresholdedrelu": (lambda xp, x, a, b: xp.where(x > a, x, xp.zeros_like(x)), 1.0, None),
}
"""Functions f(x, alpha, beta) by name in lower case, with the defaults of alpha and beta; None: it does not take it."""

Chosen = tuple[tuple[str, ...], tuple[tuple[str, ...] | None, tuple[float, ...] | None, tuple[float, ...] | None]]
"""The default functions of one direction; the functions of all directions, their alphas and their betas, if given."""


def _chosen(defaults: tuple[str, ...], given: tuple[Any, Any, Any]) -> Chosen:
    return defaults, given


def _functions(xp: Any, chosen: Chosen, directions: int) -> list[tuple[Callable[[Array], Array], ...]]:
    """The activations of each direction. Those that take an alpha or a beta take the next one that is given."""
    defaults, (given, alphas, betas) = chosen
    names = given or defaults * directions
    left = list(alphas or ()), list(betas or ())
    made: list[Callable[[Array], Array]] = []
    for name in names:
        if name.lower() not in ACTIVATIONS:
            raise Refused(f"a recurrent layer with the activation {name!r} has no handoff")
        function, *usual = ACTIVATIONS[name.lower()]
        numbers = tuple(
            0.0 if default is None else rest.pop(0) if rest else default
            for default, rest in zip(usual, left, strict=True)
        )
        made.append(_bound(xp, function, numbers))
    return [tuple(made[i : i + len(defaults)]) for i in range(0, len(made), len(defaults))]


def _bound(xp: Any, function: Activation, numbers: tuple[float, ...]) -> Callable[[Array], Array]:
    return lambda x: function(xp, x, *numbers)


class _Layer:
    """What the three operators share: the inputs, the outputs and the attributes in one form."""

    def __init__(
        self,
        xp: Any,
        x: Array,
        r: Array,
        gates: int,
        chosen: Chosen,
        direction: str,
        layout: int,
        clip: float | None,
        lengths: Array | None,
    ) -> None:
        self.xp, self.layout, self.width, self.gates, self.clip = xp, layout, r.shape[2], gates, clip
        self.x = xp.moveaxis(x, 0, 1) if layout else x
        self.backwards = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
        self.functions = _functions(xp, chosen, len(self.backwards))
        self.valid = None
        if lengths is not None:
            steps = xp.arange(self.x.shape[0], dtype=lengths.dtype, device=xp.device_of(x))
            self.valid = xp.expand_dims(xp.expand_dims(steps, axis=1) < lengths, axis=2)

    def clipped(self, x: Array) -> Array:
        """What goes into an activation."""
        return x if self.clip is None else self.xp.clip(x, -self.clip, self.clip)

    def first(self, state: Array | None, direction: int) -> Array:
        """The state before the first step of one direction, (batch, width)."""
        if state is None:
            shape = (self.x.shape[1], self.width)
            return self.xp.zeros(shape, dtype=self.x.dtype, device=self.xp.device_of(self.x))
        return state[:, direction] if self.layout else state[direction]

    def run(
        self, direction: int, inputs: Array, states: tuple[Array, ...], step: Callable[..., tuple[Array, ...]]
    ) -> tuple[tuple[Array, ...], Array]:
        """The last states, and the first state after each step, of which padding is 0 and changes nothing."""
        xp, slices = self.xp, (inputs,) if self.valid is None else (inputs, self.valid)

        def turn(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
            new = step(now[0], *carry)
            shown = new[0]
            if self.valid is not None:
                shown = xp.where(now[1], shown, xp.zeros_like(shown))
                new = tuple(xp.where(now[1], after, before) for after, before in zip(new, carry, strict=True))
            return new, (shown,)

        back = self.backwards[direction]
        slices = tuple(xp.flip(array, axis=0) for array in slices) if back else slices
        last, (shown,) = xp.scan(turn, states, slices, self.x.shape[0])
        return last, (xp.flip(shown, axis=0) if back else shown)

    def outputs(self, runs: list[tuple[tuple[Array, ...], Array]], count: int) -> Any:
        """Y[step, direction, batch, width] and the last states [direction, batch, width], as the layout asks."""
        xp, at = self.xp, 1 if self.layout else 0
        y = xp.stack([shown for _, shown in runs], axis=1)
        lasts = [xp.stack(states, axis=at) for states in zip(*(last for last, _ in runs), strict=True)]
        y = xp.moveaxis(y, 2, 0) if self.layout else y
        return y if count == 1 else (y, *lasts)[:count]


def _projected(layer: _Layer, w: Array, b: Array | None, direction: int, recurrent: slice | None) -> Array:
    """X[t, n, i] W[d, g, i] + Wb[d, g], with the gates of Rb that may be added at once, for all steps."""
    xp = layer.xp
    made = xp.matmul(layer.x, xp.moveaxis(w[direction], 0, 1))
    if b is None:
        return made
    half = layer.gates * layer.width
    made = made + b[direction, :half]
    if recurrent is None:
        return made
    bias = b[direction, half:][recurrent]
    if bias.shape[0] == half:
        return made + bias
    rest = xp.zeros((half - bias.shape[0],), dtype=bias.dtype, device=xp.device_of(bias))
    return made + xp.concat([bias, rest], axis=0)


def _split(x: Array, width: int) -> list[Array]:
    return [x[..., at : at + width] for at in range(0, x.shape[-1], width)]


@implements("RNN")
def rnn(
    xp: Any,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    """H_t = f(X_t W^T + Wb + H_(t-1) R^T + Rb)"""
    functions = activations, activation_alpha, activation_beta
    layer = _Layer(xp, x, r, 1, _chosen(("Tanh",), functions), direction, layout, clip, sequence_lens)
    runs = []
    for d, (f,) in enumerate(layer.functions):
        back = xp.moveaxis(r[d], 0, 1)

        def step(now: Array, h: Array, f: Any = f, back: Array = back) -> tuple[Array, ...]:
            return (f(layer.clipped(now + xp.matmul(h, back))),)

        projected = _projected(layer, w, b, d, slice(None))
        runs.append(layer.run(d, projected, (layer.first(initial_h, d),), step))
    return layer.outputs(runs, outputs)


@implements("GRU")
def gru(
    xp: Any,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int = 1,
) -> Any:
    """H_t = (1 - z) n + z H_(t-1); z, r = f(X_t W^T + Wb + H_(t-1) R^T + Rb), n = g(X_t W^T + Wb + (r H) R^T + Rb)

    With `linear_before_reset`, r multiplies H R^T + Rb and not H.
    """
    functions = activations, activation_alpha, activation_beta
    layer = _Layer(xp, x, r, 3, _chosen(("Sigmoid", "Tanh"), functions), direction, layout, clip, sequence_lens)
    runs, width = [], layer.width
    for d, (f, g) in enumerate(layer.functions):
        gates, new = xp.moveaxis(r[d, : 2 * width], 0, 1), xp.moveaxis(r[d, 2 * width :], 0, 1)
        shift = b[d, 5 * width :] if linear_before_reset and b is not None else None

        def step(
            now: Array, h: Array, f: Any = f, g: Any = g, gates: Array = gates, new: Array = new, shift: Any = shift
        ) -> tuple[Array, ...]:
            z, reset = _split(f(layer.clipped(now[..., : 2 * width] + xp.matmul(h, gates))), width)
            if linear_before_reset:
                behind = xp.matmul(h, new)
                behind = reset * (behind if shift is None else behind + shift)
            else:
                behind = xp.matmul(reset * h, new)
            n = g(layer.clipped(now[..., 2 * width :] + behind))
            return ((1 - z) * n + z * h,)

        projected = _projected(layer, w, b, d, slice(0, 2 * width) if linear_before_reset else slice(None))
        runs.append(layer.run(d, projected, (layer.first(initial_h, d),), step))
    return layer.outputs(runs, outputs)


@implements("LSTM")
def lstm(
    xp: Any,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    sequence_lens: Array | None = None,
    initial_h: Array | None = None,
    initial_c: Array | None = None,
    p: Array | None = None,
    *,
    activation_alpha: tuple[float, ...] | None = None,
    activation_beta: tuple[float, ...] | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int = 1,
) -> Any:
    """C_t = f_t C_(t-1) + i_t g(..), H_t = o_t h(C_t); i, o, f = f(X_t W^T + Wb + H_(t-1) R^T + Rb + P C)"""
    functions = activations, activation_alpha, activation_beta
    layer = _Layer(xp, x, r, 4, _chosen(("Sigmoid", "Tanh", "Tanh"), functions), direction, layout, clip, sequence_lens)
    runs, width = [], layer.width
    for d, (f, g, h_of) in enumerate(layer.functions):
        back = xp.moveaxis(r[d], 0, 1)
        peepholes = None if p is None else _split(p[d], width)

        def step(
            now: Array,
            h: Array,
            c: Array,
            f: Any = f,
            g: Any = g,
            h_of: Any = h_of,
            back: Array = back,
            peepholes: Any = peepholes,
        ) -> tuple[Array, ...]:
            into, out, keep, new = _split(now + xp.matmul(h, back), width)
            if peepholes is not None:
                into, keep = into + peepholes[0] * c, keep + peepholes[2] * c
            into = f(layer.clipped(into))
            keep = 1 - into if input_forget else f(layer.clipped(keep))
            cell = keep * c + into * g(layer.clipped(new))
            out = out if peepholes is None else out + peepholes[1] * cell
            return f(layer.clipped(out)) * h_of(cell), cell

        states = layer.first(initial_h, d), layer.first(initial_c, d)
        runs.append(layer.run(d, _projected(layer, w, b, d, slice(None)), states, step))
    return layer.outputs(runs, outputs)
