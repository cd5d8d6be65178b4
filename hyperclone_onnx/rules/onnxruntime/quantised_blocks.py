"""Weights of few bits, packed in bytes and quantised in blocks. Each block has one scale."""

from __future__ import annotations

from collections.abc import Sequence

from hyperclone_onnx.algebra.dims import Product, Term
from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.grown_op import GrownOp
from hyperclone_onnx.rules.indexing import index_by
from hyperclone_onnx.rules.onnxruntime.mixture import fused_rows, relate_experts
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.quantised import BLOCK, blocks_of, parameters
from hyperclone_onnx.rules.registry import edits, relates


def relate_packed_zeros(op: Op, index: int, rows: Axes, blocks: Term, bits: int) -> None:
    """Relate zero points of blocks: `bits` bits each, packed in bytes row by row, or floats like the scales."""
    if not op.has(index):
        return
    packed = op.value(index).dtype is not None and not op.value(index).dtype.is_floating_point()  # type: ignore[union-attr]
    if packed and bits < 8:
        op.packed(index, (*rows, blocks), bits)
    elif op.rank(index) == 1:
        op.space.match(op.axes(index), [*rows, blocks])
    else:
        op.unify_axes(op.axes(index), (*rows, blocks))


def relate_blocks(op: Op, columns: Term, width: Term, codes: int, scales: int, zeros: int | None) -> None:
    """Relate codes B[n, block, byte], scales[n, block] and zero_points[n, block] of a weight W[n, (block, within)]."""
    size, bits = op.positive("block_size"), op.positive("bits", 4)
    b = op.axes(codes)
    if len(b) != 3:
        raise CannotTell("codes that are not (columns, blocks, bytes)")
    op.pin(b[2], BLOCK)
    op.unify(b[0], columns)
    blocks_of(op, width, b[1], size)
    if op.rank(scales) == 1:
        op.space.match(op.axes(scales), [columns, b[1]])
    else:
        op.unify_axes(op.axes(scales), (columns, b[1]))
    if zeros is not None:
        relate_packed_zeros(op, zeros, (columns,), b[1], bits)


@relates("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(op: Op) -> None:
    """Y[.., n] = sum_k A[.., k] scales[n, block of k] (B[n, k] - zero_points[n, block of k]) + bias[n]"""
    a = op.axes(0, least=1)
    if op.has(4):
        raise CannotTell("columns in another order (g_idx)")
    if op.integer("weight_prepacked", 0):
        raise CannotTell("codes that are laid out for one device")
    columns = op.dim(op.integer("N"))
    relate_blocks(op, columns, a[-1], 1, 2, 3)
    op.sum_over((0, -1), scales=(2,))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, a[-1])
    op.fact(Fact.WEIGHT_OUTPUT, columns)
    if op.has(5):
        op.unify(op.axis_of(5, 0), columns)
    op.out((*a[:-1], columns))


@edits("MatMulNBits", domain=MICROSOFT)
def edit_matmul_nbits(op: GrownOp) -> None:
    """Sets the attributes of lengths, which cannot be read off packed codes."""
    for name, term in (("K", op.axis_of(0, -1)), ("N", op.out_axes(0)[-1])):
        if op.grows(term):
            op.set_attribute(name, op.grown(term))


@relates("MatMulNBitsMlp", domain=MICROSOFT)
def matmul_nbits_mlp(op: Op) -> None:
    """Y[.., n] = f(gate(x))[n] up(x)[n], both MatMulNBits of x = A, norm(A) or norm(A + skip)"""
    a = op.axes(0, least=1)
    columns = op.dim(op.integer("N"))
    _normed(op, a)
    _projections(op, a[-1], ((3, 4, 5, columns), (6, 7, 8, columns)))
    op.out((*a[:-1], columns))
    op.out(a, index=1)


@relates("MatMulNBitsQkv", domain=MICROSOFT)
def matmul_nbits_qkv(op: Op) -> None:
    """Queries, keys and values as MatMulNBits of norm(A) or norm(A + skip)"""
    a = op.axes(0, least=1)
    queries, keys, values = op.dim(op.integer("Nq")), op.dim(op.integer("Nkv")), op.dim(op.integer("Nkv"))
    _normed(op, a)
    _projections(op, a[-1], ((3, 4, 5, queries), (6, 7, 8, keys), (9, 10, 11, values)))
    for index, columns in enumerate((queries, keys, values)):
        op.out((*a[:-1], columns), index=index)
    op.out(a, index=3)


def _normed(op: Op, a: Axes) -> None:
    """Relate the normalisation before the projections, and the residual stream that is added to A."""
    if op.has(1):
        op.broadcast([a, op.axes(1)])
    if op.has(2):
        op.unify(op.axis_of(2, 0), a[-1])
        op.uniform(a[-1])


def _projections(op: Op, width: Term, slots: Sequence[tuple[int, int, int, Term]]) -> None:
    """Relate projections of one input: for each the inputs of codes, scales and bias, and the columns."""
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, width)
    for codes, scales, bias, columns in slots:
        relate_blocks(op, columns, width, codes, scales, None)
        op.fact(Fact.WEIGHT_OUTPUT, columns)
        if op.has(bias):
            op.unify(op.axis_of(bias, 0), columns)
    for _, scales, _, _ in slots:
        op.sum_over((0, -1), scales=(scales,))


@edits("MatMulNBitsMlp", domain=MICROSOFT)
def edit_matmul_nbits_mlp(op: GrownOp) -> None:
    """Sets the attributes of lengths, which cannot be read off packed codes."""
    edit_matmul_nbits(op)


@edits("MatMulNBitsQkv", domain=MICROSOFT)
def edit_matmul_nbits_qkv(op: GrownOp) -> None:
    """Sets the attributes of lengths, which cannot be read off packed codes."""
    for name, term in (("K", op.axis_of(0, -1)), ("Nq", op.out_axes(0)[-1]), ("Nkv", op.out_axes(1)[-1])):
        if op.grows(term):
            op.set_attribute(name, op.grown(term))


@relates("MatMulBlockQuantizedFp8Weight", domain=MICROSOFT)
def matmul_fp8(op: Op) -> None:
    """Y[.., n] = sum_k A[.., k] b_scale[n, block of k] B[n, k] + bias[n]"""
    a, b = op.axes(0, least=1), op.axes(1, rank=2)
    op.unify(b[1], a[-1])
    rows, blocks = op.axes(2, rank=2)
    op.unify(rows, b[0])
    blocks_of(op, b[1], blocks, op.positive("block_size"))
    parameters(op, 3)
    op.sum_over((0, -1), scales=(2,))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, a[-1])
    op.fact(Fact.WEIGHT_OUTPUT, b[0])
    if op.has(4):
        op.unify(op.axis_of(4, 0), b[0])
    op.out((*a[:-1], b[0]))


@relates("MatMulBlockQuantizedFp4Weight", domain=MICROSOFT)
def matmul_fp4(op: Op) -> None:
    """Y[.., n] = weight_scale_2 sum_k A[.., k] weight_scale[n, block of k] B[n, k] + bias[n], two codes in a byte"""
    a, b, size = op.axes(0, least=1), op.axes(1, rank=2), op.positive("block_size", 16)
    rows, blocks = op.axes(2, rank=2)
    op.unify(rows, b[0])
    blocks_of(op, a[-1], blocks, size)
    blocks_of(op, b[1], blocks, size // 2)
    parameters(op, 3, 4)
    op.sum_over((0, -1), scales=(3,))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, a[-1])
    op.fact(Fact.WEIGHT_OUTPUT, b[0])
    if op.has(5):
        op.unify(op.axis_of(5, 0), b[0])
    op.out((*a[:-1], b[0]))


@relates("MatMulBnb4", domain=MICROSOFT)
def matmul_bnb4(op: Op) -> None:
    """Y[.., n] = sum_k A[.., k] absmax[block of (n, k)] B[(n, k)], where B is flat and a block may cross rows"""
    a, size = op.axes(0, least=1), op.positive("block_size")
    rows, width = op.positive("N"), op.positive("K")
    if width % size:
        raise CannotTell("blocks that cross the end of a row")
    transposed = op.integer("transB", 1)
    n, blocks = op.dim(rows), op.dim(width // size)
    k = Product((blocks, op.pinned_dim(size, BLOCK)))
    op.space.match(op.axes(1), [n, blocks, op.pinned_dim(size // 2, BLOCK)])
    op.space.match(op.axes(2), [n, blocks])
    op.space.match([a[-1]], [k if transposed else n])
    op.sum_over((0, -1), scales=(2,))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, a[-1])
    out = n if transposed else k
    op.fact(Fact.WEIGHT_OUTPUT, out)
    op.out((*a[:-1], out))


@edits("MatMulBnb4", domain=MICROSOFT)
def edit_matmul_bnb4(op: GrownOp) -> None:
    """Sets the attributes of lengths, which cannot be read off flat codes."""
    a, out = op.axis_of(0, -1), op.out_axes(0)[-1]
    for name, term in (("K", a), ("N", out)) if op.integer("transB", 1) else (("N", a), ("K", out)):
        if op.grows(term):
            op.set_attribute(name, op.grown(term))


@relates("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(op: Op) -> None:
    """out[i, .., k] = scales[indices[i], .., block of k] (data[indices[i], .., k] - zero_points[..])"""
    data, where = op.axes(0), op.axes(1)
    rank = len(data)
    scale = op.axes(2, rank=rank)
    picked, along = op.axis(op.integer("gather_axis", 0), rank), op.axis(op.integer("quantize_axis", 1), rank)
    dtype = op.value(0).dtype
    bits = op.positive("bits", 4) if dtype is not None and dtype.name == "UINT8" else 8
    size = op.integer("block_size", 128)
    if picked == along or not size or (bits < 8 and along != rank - 1):
        raise CannotTell("blocks along another axis than the last, or along the gathered axis")
    index_by(op, data[picked], 1)
    for axis in range(rank):
        if axis != along:
            op.merge([data[axis], scale[axis]])
            if axis != picked:
                op.fact(Fact.EMBEDDING, data[axis])
    blocks = scale[along]
    blocks_of(op, data[along], blocks, size * bits // 8)
    width = op.dim((op.static(data[along]) or 0) * 8 // bits)
    blocks_of(op, width, blocks, size)
    op.fact(Fact.EMBEDDING, width)
    if op.has(3):
        if bits < 8:
            op.packed(3, (*data[:along], blocks), bits)
        else:
            op.unify_axes(op.axes(3), scale)
    whole = (*data[:along], width, *data[along + 1 :])
    op.out((*whole[:picked], *where, *whole[picked + 1 :]))


# -- mixture of experts -----------------------------------------------------------------------------------


@relates("QMoE", domain=MICROSOFT)
def quantised_experts(op: Op) -> None:
    """MoE whose weights are codes, packed along the summed axis, with one scale for each row or block"""
    if op.text("quant_type", "int") != "int" or op.integer("weights_prepacked", -1) > 0:
        raise CannotTell("experts stored as floats of 4 or 8 bits, or laid out for one device")
    inter_size = op.static(op.axes(5, rank=3)[2])
    usual = op.positive("expert_weight_bits", 4)
    bits = [op.positive(f"fc{i}_expert_weight_bits", usual) for i in (1, 2, 3)]
    if inter_size is None or not op.has(3) or not op.has(6):
        raise CannotTell("experts of unknown width, or without scales")
    x, inter = op.axes(0, least=2), op.dim(inter_size * 8 // bits[1])
    rows = fused_rows(op, op.axis_of(2, 1), inter)
    projections = [(2, 3, 4, 11, rows, x[-1], bits[0]), (5, 6, 7, 12, x[-1], inter, bits[1])]
    if op.has(8):
        projections.append((8, 9, 10, 13, inter, x[-1], bits[2]))
    op.unify(op.axis_of(2, 1), rows)
    slots = [slot for projection in projections for slot in projection[:4]]
    experts = relate_experts(op, inter, slots, op.axis_of(5, 0))
    for codes, scales, bias, zeros, out, summed, width in projections:
        _relate_experts_codes(op, codes, scales, zeros, (experts, out), summed, width)
        if op.has(bias):
            op.unify(op.axis_of(bias, 1), out)
    if op.has(14):
        op.unify_axes(op.axes(14), op.axes(1))
    op.out(x)


def _relate_experts_codes(
    op: Op, codes: int, scales: int, zeros: int, rows: tuple[Term, Term], summed: Term, bits: int
) -> None:
    """Relate codes[e, row, byte], scales[e, row] or [e, row, block] and zero points of one projection."""
    _, row, packed = op.axes(codes, rank=3)
    op.unify(row, rows[1])
    op.unify(op.axis_of(scales, 1), row)
    size = op.integer("block_size", 0)
    if size:
        blocks = op.axis_of(scales, 2)
        blocks_of(op, summed, blocks, size)
        blocks_of(op, packed, blocks, size * bits // 8)
        relate_packed_zeros(op, zeros, rows, blocks, bits)
    else:
        op.space.match([summed], [packed, op.pinned_dim(8 // bits, "codes that share a byte")])
        relate_packed_zeros(op, zeros, rows[:1], row, bits)
    site = (0, -1) if codes != 5 else (5, 2)
    op.sum_over(site, scales=(scales,))
    op.fact(Fact.CONTRACTED_WITH_WEIGHT, summed)
    op.fact(Fact.WEIGHT_OUTPUT, row)
