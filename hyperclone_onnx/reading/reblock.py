"""Makes quantisation blocks smaller if the last block of a row is not full.

576 columns in blocks of 128 end with half a block. If such a row is repeated, the repeats do not begin with a block. In
blocks of 64, all blocks are full. Each new block has the scale of its old block, so the weight is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from hyperclone_onnx.graphs import MICROSOFT, FreshNames
from hyperclone_onnx.tensors.packing import pack, packed_width, unpack

Array = npt.NDArray[Any]
SMALLEST = 16
"""ONNX Runtime's smallest block."""


def reblock(graph: ir.Graph) -> None:
    """Make the blocks of MatMulNBits and GatherBlockQuantized smaller where they do not fill the rows.

    A node stays as it is if no power of two from 16 on divides its rows.
    """
    fresh = FreshNames(graph)
    changed: _Changed = {}
    for node in graph:
        if node.domain == MICROSOFT and node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            if not _is_well_formed(node):  # its rule refuses it
                continue
            blocks = _blocks_of_columns(node) if node.op_type == "MatMulNBits" else _blocks_of_table(node)
            if blocks is not None and blocks.smaller < blocks.size and blocks.fits(node):
                blocks.cut(graph, node, fresh, changed)


@dataclass(frozen=True)
class _Blocks:
    """Rows of `width` numbers of `bits` bits, quantised in blocks of `size`."""

    rows: int
    width: int
    size: int
    bits: int

    @property
    def smaller(self) -> int:
        """The largest power of two that divides a row and is a possible block size, or the present size."""
        largest = self.width & -self.width  # the largest power of two that divides it
        return largest if SMALLEST <= largest < self.size and self.width % self.size else self.size

    def fits(self, node: ir.Node) -> bool:
        """Whether a node's codes, scales and zero points are stored and have the right number of elements."""
        count = -(-self.width // self.size)
        codes, scales = self.rows * count * packed_width(self.size, self.bits), self.rows * count
        packed = self.rows * packed_width(count, self.bits)
        possible = [(2, {scales}), (3, {scales, packed})]
        if node.op_type == "MatMulNBits":
            possible.append((1, {codes}))
        for slot, sizes in possible:
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if value is not None and (value.const_value is None or value.const_value.size not in sizes):
                return False
        return True

    def cut(self, graph: ir.Graph, node: ir.Node, fresh: FreshNames, changed: _Changed) -> None:
        """Give a node's codes, scales and zero points smaller blocks. Nodes that share a tensor share the new one."""
        changes = [(2, self._scales), (3, self._zeros)]
        if node.op_type == "MatMulNBits":
            changes.append((1, self._codes))
        for slot, change in changes:
            value = node.inputs[slot] if slot < len(node.inputs) else None
            if value is None:
                continue
            key = value, self.smaller, slot
            if key not in changed:
                changed[key] = _store(graph, fresh.value(f"{value.name}.blocks_of_{self.smaller}"), value, change)
            node.replace_input_with(slot, changed[key])
        node.attributes["block_size"] = ir.AttrInt64("block_size", self.smaller)

    def _codes(self, array: Array) -> Array:
        rows = array.reshape(self.rows, -1)[:, : packed_width(self.width, self.bits)]
        return rows.reshape(self.rows, self.width // self.smaller, packed_width(self.smaller, self.bits))

    def _repeated(self, numbers: Array) -> Array:
        return np.repeat(numbers, self.size // self.smaller, axis=1)[:, : self.width // self.smaller]

    def _scales(self, array: Array) -> Array:
        numbers = self._repeated(array.reshape(self.rows, -1))
        return numbers if array.ndim > 1 else numbers.reshape(-1)

    def _zeros(self, array: Array) -> Array:
        if array.dtype.kind not in "iu" or self.bits == 8:
            return self._scales(array)
        numbers = pack(self._repeated(unpack(array, (self.rows, -(-self.width // self.size)), self.bits)), self.bits)
        return numbers if array.ndim > 1 else numbers.reshape(-1)


_Changed = dict[tuple[ir.Value, int, int], ir.Value]
"""The new value for a stored value, a new block size and the position of the input."""


def _is_well_formed(node: ir.Node) -> bool:
    """Whether the required inputs are there, and the attributes are integers above 0."""
    names = ("N", "K", "block_size", "bits", "weight_prepacked", "gather_axis", "quantize_axis")
    attributes = [attribute for name in names if (attribute := node.attributes.get(name)) is not None]
    if len(node.inputs) < 3 or None in node.inputs[:3]:
        return False
    if any(attribute.type != ir.AttributeType.INT for attribute in attributes):
        return False
    return all(attribute.as_int() > 0 for attribute in attributes if attribute.name in names[:4])


def _is_stored(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _blocks_of_columns(node: ir.Node) -> _Blocks | None:
    if not _is_stored(node.inputs[1]) or any(node.inputs[4:5]) or _integer(node, "weight_prepacked", 0):
        return None
    if any(name not in node.attributes for name in ("N", "K", "block_size")):
        return None
    rows, width, size = (_integer(node, name, 0) for name in ("N", "K", "block_size"))
    return _Blocks(rows, width, size, _integer(node, "bits", 4))


def _blocks_of_table(node: ir.Node) -> _Blocks | None:
    data = node.inputs[0]
    tensor = None if data is None else data.const_value
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype.bitwidth > 8:
        return None
    if _integer(node, "gather_axis", 0) != 0 or _integer(node, "quantize_axis", 1) not in (1, -1):
        return None
    rows, count = tensor.shape.numpy()
    bits = _integer(node, "bits", 4) if tensor.dtype == ir.DataType.UINT8 else 8  # others: one code an element
    return _Blocks(rows, count * 8 // bits, _integer(node, "block_size", 128), bits)


def _store(graph: ir.Graph, name: str, value: ir.Value, change: Callable[[Array], Array]) -> ir.Value:
    """A stored value computed from another one."""
    tensor = value.const_value
    assert tensor is not None
    made = ir.tensor(np.ascontiguousarray(change(tensor.numpy())), dtype=tensor.dtype, name=name)
    result = ir.Value(name=name, shape=made.shape, type=ir.TensorType(made.dtype), const_value=made)  # type: ignore[arg-type]
    graph.register_initializer(result)
    return result
