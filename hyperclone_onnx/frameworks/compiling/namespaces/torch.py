"""The namespace for PyTorch: array-api-compat adapts it to the standard."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as _standard
import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it
from array_api_compat.torch import *

from hyperclone_onnx.frameworks.compiling.namespaces import dtype_name
from hyperclone_onnx.frameworks.compiling.ops import control as _control
from hyperclone_onnx.frameworks.compiling.ops.attention import attend as _attend
from hyperclone_onnx.frameworks.compiling.ops.resize import taps as _taps

bool = torch.bool
abs, all, any, max, min, round, sum, pow = (
    getattr(_standard, name) for name in ("abs", "all", "any", "max", "min", "round", "sum", "pow")
)
erf, einsum, sigmoid, softplus, relu, expm1 = (
    torch.erf,
    torch.einsum,
    torch.sigmoid,
    F.softplus,
    torch.relu,
    torch.expm1,
)
NAME = "torch"
torch.compiler.assume_constant_result(_taps)  # torch.compile would trace its NumPy as tensors


def dtype_named(name: str) -> Any:
    """The type of a name."""
    return getattr(torch, name)


def dtype_of(number: int) -> Any:
    """The type of an ONNX element type."""
    return getattr(torch, dtype_name(number))


def device_of(x: Any) -> Any:
    """The device of a tensor. None means torch's default device."""
    return getattr(x, "device", None)


def lift(value: Any, number: int, device: Any) -> Any:
    """A tensor of Python numbers, or of symbols that stand for them."""
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=dtype_of(number), device=device)
    return torch.full((), value, dtype=dtype_of(number), device=device)


def numbers(array: Any) -> Any:
    """The elements of a tensor as Python numbers."""
    return tuple(array.tolist()) if array.ndim else array.item()


def fixed(x: Any) -> Any:
    """The same numbers, through which no gradient goes."""
    return x.detach()


def grouped_matmul(rows: Any, weight: Any, sizes: Any) -> Any:
    """Products of rows, sorted by group, with the matrix of their group.

    torch.compile cannot have sizes that depend on data. PyTorch's own kernel takes them as a tensor, but not all types
    and widths; for others, each group is multiplied with all rows.
    """
    counts = None if torch.compiler.is_compiling() else _counts(sizes)
    if counts is not None:
        parts = torch.split(rows, counts)
        return torch.cat([part @ matrix for part, matrix in zip(parts, torch.unbind(weight), strict=True)])
    ends = torch.cumsum(sizes, 0)
    aligned = builtins.all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and rows.dtype in (torch.bfloat16, torch.float16) and rows.dtype == weight.dtype:
        return F.grouped_mm(rows, weight, offs=ends.to(torch.int32))
    places = torch.arange(rows.shape[0], device=rows.device)
    groups = torch.searchsorted(ends, places, right=True)
    total = rows.new_zeros((rows.shape[0], weight.shape[2]))
    for number, matrix in enumerate(torch.unbind(weight)):
        total = total + torch.where((groups == number)[:, None], rows @ matrix, torch.zeros_like(total))
    return total


def _counts(sizes: Any) -> Any:
    """The elements of a tensor as a list; None where it has no values, as under torch.func.vmap."""
    try:
        return sizes.tolist()
    except RuntimeError:
        return None


def branch(condition: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """The results of one of two branches."""
    return yes() if condition else no()


def softmax(x: Any, axis: int) -> Any:
    """e^x / sum e^x"""
    return torch.softmax(x, axis)


def log_softmax(x: Any, axis: int) -> Any:
    """x - log sum e^x"""
    return torch.log_softmax(x, axis)


def logsumexp(x: Any, axis: Any, keepdims: Any) -> Any:
    """log sum e^x"""
    return torch.logsumexp(x, axis, keepdim=keepdims)


def scan(step: Any, carry: Any, slices: Any, length: Any) -> Any:
    """carry, results = step(carry, slices[i]) for each i"""
    import hyperclone_onnx.frameworks.compiling.namespaces.torch as xp

    return _control.scan_in_turns(xp, step, carry, slices, length)


def loop(turn: Any, trips: Any, condition: Any, states: Any, *, numbered: Any, device: Any) -> Any:
    """ONNX's Loop"""
    import hyperclone_onnx.frameworks.compiling.namespaces.torch as xp

    return _control.loop_in_turns(xp, turn, trips, condition, states, numbered=numbered, device=device)


def attend(
    query: Any, key: Any, value: Any, *biases: Any, scale: float, key_transposed: int = 0, grouped: Any = False
) -> Any:
    """softmax(scale Q K^T + biases) V, by the fused kernels. A row of the result is 0 if its query sees no key."""
    if not grouped and not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        import hyperclone_onnx.frameworks.compiling.namespaces.torch as xp

        return _attend(xp, query, key, value, *biases, scale=scale, key_transposed=key_transposed)
    bias = None
    for addend in biases:
        bias = addend if bias is None else bias + addend
    if bias is not None and bias.dtype != query.dtype:
        bias = bias.to(query.dtype)
    if bias is not None and bias.shape[-1] != 0:
        query, bias = _zero_masked_rows(query, bias)
    key = key.mT if key_transposed else key
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=grouped)


def _zero_masked_rows(query: Any, bias: Any) -> Any:
    """Return queries and a mask that are both 0 in rows whose mask is finite but so low that it rounds away all scores.

    The result of such a row is the mean of all values, with or without this change. But the kernel's backward pass adds
    the logarithm of the sum to the large mask, where it is rounded away. In the gradient each of n values would then
    have the weight 1 instead of 1 / n.
    """
    highest = bias.detach().amax(-1, keepdim=True)
    rows = (highest <= -16 / torch.finfo(bias.dtype).eps) & (highest > -torch.inf)
    if _is_seen_empty(rows):
        return query, bias
    return torch.where(rows, torch.zeros_like(query), query), torch.where(rows, torch.zeros_like(bias), bias)


def _is_seen_empty(rows: Any) -> Any:
    """Whether no element is true. On a GPU or while tracing, looking costs time or fails: then the answer is False."""
    if rows.device.type != "cpu" or type(rows) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    try:
        return not rows.any()
    except RuntimeError:  # under torch.func.vmap the tensor has no value
        return False


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter(flat: Any, places: Any, updates: Any, reduction: str) -> Any:
    """A copy of flat in which flat[places] is set to updates, or updates are added, multiplied, ..."""
    places, values = places.long(), updates.reshape(-1)
    if reduction == "none":
        return torch.scatter(flat, 0, places, values)
    return torch.scatter_reduce(flat, 0, places, values, _REDUCTIONS[reduction], include_self=True)


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def convolution(x: Any, w: Any, strides: Any, dilations: Any, around: Any, group: int) -> Any:
    """The convolution of PyTorch."""
    if builtins.any(before != after for before, after in around):
        x = F.pad(x, [size for pair in reversed(around) for size in pair])
        around = [(0, 0)] * len(around)
    padding = [before for before, _ in around]
    return _CONVOLUTIONS[w.ndim - 2](x, w, None, strides, padding, dilations, group)
