"""Operators that multiply and sum.

When a summed axis is repeated, the repeats of each summand must share its value. The rules only say *what* is summed.
The plan decides which factor is divided: a weight or a scalar.
"""

from __future__ import annotations

from collections import defaultdict

from hyperclone_onnx.algebra.dims import Term
from hyperclone_onnx.rules.dimensions import Axes, Fact
from hyperclone_onnx.rules.op import CannotTell, Op
from hyperclone_onnx.rules.registry import relates


def note_roles(op: Op, batch: Axes, left_free: Axes, right_free: Axes, slots: tuple[int, int] = (0, 1)) -> None:
    """Record facts about the free and batch axes of a contraction of the two inputs at `slots`."""
    if any(op.is_weight(index) for index in slots):
        for index, free in zip(slots, (left_free, right_free), strict=True):
            if op.is_weight(index):
                for term in free:
                    op.fact(Fact.WEIGHT_OUTPUT, term)
        return
    for term in batch:
        op.fact(Fact.BATCHED, term)
    for term in (*left_free, *right_free):
        op.fact(Fact.VALUE_AXIS, term)


def relate_matmul(
    op: Op, a: int, b: int, *, integers: bool = False, scales: tuple[int, ...] = (), biases: tuple[int, ...] = ()
) -> None:
    """Relate a product of the inputs `a` and `b`; see `Op.sum_over` for the rest."""
    left, right = op.axes(a), op.axes(b)
    if not left or not right:
        raise CannotTell("MatMul with a scalar")
    op.sum_over((a, len(left) - 1), (b, max(len(right) - 2, 0)), integers=integers, scales=scales, biases=biases)
    left_free, right_free = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batch = op.broadcast([left[:-2], right[:-2]])
    for one, other in zip(reversed(left[:-2]), reversed(right[:-2]), strict=False):
        for narrow, wide in ((one, other), (other, one)):
            if op.is_one(narrow) and not op.is_one(wide):
                op.fact(Fact.EXPANDED, wide)
    note_roles(op, batch, left_free, right_free, (a, b))
    op.out((*batch, *left_free, *right_free))


@relates("MatMul")
def matmul(op: Op) -> None:
    """C[.., m, n] = sum_k A[.., m, k] B[.., k, n]; a vector operand has no free axis"""
    relate_matmul(op, 0, 1)


@relates("Gemm")
def gemm(op: Op) -> None:
    """Y[m, n] = alpha sum_k A'[m, k] B'[k, n] + beta C[m, n], with A', B' = A, B or their transposes"""
    left, right = op.axes(0, rank=2), op.axes(1, rank=2)
    trans_a, trans_b = op.integer("transA", 0), op.integer("transB", 0)
    op.number("alpha")  # planning divides by it
    op.sum_over((0, 0 if trans_a else 1), (1, 1 if trans_b else 0))
    m, n = left[1 if trans_a else 0], right[0 if trans_b else 1]
    note_roles(op, (), (m,), (n,))
    out: Axes = (m, n)
    if op.has(2):
        out = op.broadcast([out, op.axes(2)])
    op.out(out)


@relates("Einsum")
def einsum(op: Op) -> None:
    """out[free] = the product of the operands, summed over the letters that are not in the output"""
    letters, output = _parse_einsum(op)
    terms: dict[str, Term] = {}
    sites: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, word in enumerate(letters):
        axes = op.axes(index)
        if len(axes) != len(word):
            raise CannotTell("Einsum whose equation does not fit an operand's rank")
        for position, (letter, term) in enumerate(zip(word, axes, strict=True)):
            if word.count(letter) > 1:
                op.pin(term, "Einsum takes a diagonal along it")
            terms[letter] = op.merge([terms[letter], term]) if letter in terms else term
            if not op.is_one(term):
                sites[letter].append((index, position))
    for letter in terms:
        if letter not in output and sites[letter]:
            op.sum_over(*sites[letter])
    if len(letters) == 2:
        shared = set(letters[0]) & set(letters[1])
        note_roles(
            op,
            tuple(terms[x] for x in output if x in shared),
            tuple(terms[x] for x in output if x in letters[0] and x not in shared),
            tuple(terms[x] for x in output if x in letters[1] and x not in shared),
        )
    op.out([terms[letter] for letter in output])


def _parse_einsum(op: Op) -> tuple[list[list[str]], list[str]]:
    """The letters of each operand and of the output; an ellipsis becomes letters too ("<0>", "<1>", ...)."""
    left, arrow, right = op.text("equation", "").replace(" ", "").partition("->")
    words = left.split(",")
    if len(words) != op.count:
        raise CannotTell("Einsum whose equation does not fit its operands")
    widths = [op.rank(i) - len(word.replace("...", "")) for i, word in enumerate(words) if "..." in word]
    dots = [f"<{i}>" for i in range(max(widths, default=0))]

    def spell(word: str, width: int) -> list[str]:
        before, ellipsis, after = word.partition("...")
        return [*before, *(dots[len(dots) - width :] if ellipsis else ()), *after]

    letters = [spell(word, op.rank(i) - len(word.replace("...", ""))) for i, word in enumerate(words)]
    if arrow:
        return letters, spell(right, len(dots))
    flat = [letter for word in letters for letter in word]
    return letters, dots + sorted(x for x in set(flat) - set(dots) if flat.count(x) == 1)
