"""The report of `expand` for one model: what grew, what did not grow and why, the sizes, and the validation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from hyperclone_onnx.errors import in_bytes
from hyperclone_onnx.expansion.report import Expansion, SizeChange
from hyperclone_onnx.planning.experts import mixtures
from hyperclone_onnx.planning.next_layers import from_next_layer
from hyperclone_onnx.planning.training_recipe import RECIPE
from hyperclone_onnx.reports.tables import counted, plain_table, print_line
from hyperclone_onnx.reports.validation import print_validation
from hyperclone_onnx.transforms.layers import deepened


def print_expansion(console: Console, result: Expansion) -> None:
    """Print the whole report."""
    print_growth(console, result)
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
    if result.output is None:
        console.print(f"planned, nothing written ({took})", markup=False)
        return
    if result.validation is None:
        console.print("not validated (--validate none)")
    else:
        print_validation(console, result.validation)
    print_line(console, f"wrote {_files(result)} ({took})")
    for line in RECIPE.lines():
        print_line(console, line)


def print_growth(console: Console, result: Expansion) -> None:
    """Print what grew, what did not grow and why, and the sizes."""
    _print_compared(console, result)
    _print_grown(console, result)
    for name, (before, after) in deepened(result.plan.transforms).items():
        print_line(
            console, f"{name} {before} -> {after}" if name == "layers" else f"{name}: layers {before} -> {after}"
        )
    for line in mixture_lines(result):
        print_line(console, line)
    for note in result.notes:
        print_line(console, f"note: {note}")
    _print_kept(console, result)
    for line in growth_notes(result):
        print_line(console, line)
    ratio = result.parameters_after / max(result.parameters_before, 1)
    console.print(f"parameters: {result.parameters_before:,} -> {result.parameters_after:,} (x{ratio:.2f})")


def mixture_lines(result: Expansion) -> list[str]:
    """Lines about feed-forward blocks that became experts."""
    return [
        f"experts: {counted('feed-forward block', mixture['blocks'])} with {mixture['experts']} experts, "
        f"{mixture['chosen']} chosen for a token"
        for mixture in mixtures(result.plan.transforms)
    ]


def growth_notes(result: Expansion) -> list[str]:
    """Lines about what is special in this growth; most growths have none."""
    lines = []
    if result.quantised and not result.plan.is_even:
        lines.append(
            f"{result.quantised} quantised tensors: their codes are repeated and their scales divided, so their shares "
            "are equal and have no noise"
        )
    lines += _weighed(result)
    borrowed = from_next_layer(result.plan)
    if borrowed:
        lines.append(
            f"{borrowed} of {len(result.plan.tensors)} grown tensors take their extra outputs from the next layer; the "
            "others, those of the last layer included, repeat their own"
        )
    for name, copies in result.separated.items():
        lines.append(f"{name} is one tensor in the source and several here: {', '.join(copies)}")
    return lines


def _weighed(result: Expansion) -> list[str]:
    """One line about the norms that are written out with weights."""
    norms = result.plan.weighed
    if not norms:
        return []
    dims = ", ".join(dict.fromkeys(name for names in norms.values() for name in names))
    first = next(iter(norms))
    listed = repr(first) if len(norms) == 1 else f"{first!r} and {len(norms) - 1} more"
    counts = (
        "norm is written out, so that it counts" if len(norms) == 1 else "norms are written out, so that they count"
    )
    return [
        f"{len(norms)} {counts} each source channel once ({listed}): the indices of {dims} are repeated unequally, and "
        "no scale of them keeps what is averaged. A Hugging Face configuration cannot say this"
    ]


def _files(result: Expansion) -> str:
    """The output with its size, and its data files with theirs."""
    texts = [
        in_bytes(size) if number == 0 else f"{name} {in_bytes(size)}"
        for number, (name, size) in enumerate(result.files.items())
    ]
    more = f" and {len(texts) - 3} more files" if len(texts) > 4 else ""
    listed = texts if not more else texts[:3]
    return f"{result.output}: {', '.join(listed)}{more}" if texts else str(result.output)


def _print_compared(console: Console, result: Expansion) -> None:
    """The sizes of source, target and result side by side, and what the target has that the result has not."""
    if result.likeness is None:
        return
    table = plain_table("size", "source", "target", "result")
    for row in result.compared:
        cells = ("" if number is None else str(number) for number in (row.source, row.target, row.result))
        table.add_row(row.role, *cells)
    console.print(table)
    for difference in result.likeness.differences:
        print_line(console, f"not like {result.likeness.path}: {difference}")


def _print_grown(console: Console, result: Expansion) -> None:
    """A row for each role and sizes of what grew, as people call it; then what is not the size that was asked for."""
    rows = grown_rows(result)
    nearest = any(row.wanted is not None for row in rows)
    if not rows and (deepened(result.plan.transforms) or mixtures(result.plan.transforms)):
        return
    if not rows:
        print_line(console, "nothing grows: every size stays, and the result computes the same with the same weights")
        return
    table = plain_table("grew", "from", "to", *(["nearest to"] if nearest else []))
    for row in rows:
        cells = [row.label, str(row.before), str(row.after)]
        table.add_row(*cells, *([f"{row.wanted:g}" if row.wanted is not None else ""] if nearest else []))
    console.print(table)


def _print_kept(console: Console, result: Expansion) -> None:
    """A row for each role, size and reason of the dimensions that kept their size."""
    rows = kept_rows(result)
    if not rows:
        return
    table = plain_table("kept", "size", "why")
    for row in rows:
        table.add_row(row.label, str(row.before), row.why)
    console.print(table)


@dataclass(frozen=True)
class SizeRow:
    """Sizes that agree in everything: a row of a report."""

    role: str
    label: str
    """The name of the size, or its role with the number of sizes."""
    before: int
    after: int
    wanted: float | None = None
    """The size that was asked for, where the graph cannot have it."""
    why: str = ""
    """Why the size stayed."""


def grown_rows(result: Expansion) -> list[SizeRow]:
    """A row for each role and sizes of what grew, as people call it."""
    rows: dict[tuple[str, int, int, float | None], list[str]] = defaultdict(list)
    for size in result.sizes:
        if size.after != size.before:
            rows[size.role, size.before, size.after, size.wanted].append(size.name)
    told = {name for size in result.sizes for name in size.dims}
    for name, dim in result.plan.dims.items():
        if name not in told:
            rows[dim.role, dim.map.size, dim.map.grown, None].append(name)
    return [
        SizeRow(role, size_label(role, names), before, after, wanted)
        for (role, before, after, wanted), names in rows.items()
    ]


def size_label(role: str, names: Sequence[str]) -> str:
    """The name of what is alone in its row; the role of a head's size, whose name lists its parts."""
    return names[0] if len(names) == 1 and "+" not in names[0] else counted(role, len(names))


def kept_rows(result: Expansion) -> list[SizeRow]:
    """A row for each role, size and reason of the dimensions that kept their size."""
    sizes_of: dict[str, list[SizeChange]] = defaultdict(list)
    for change in result.sizes:
        for name in change.dims:
            sizes_of[name].append(change)
    rows: dict[tuple[str, int, str], int] = defaultdict(int)
    told: set[SizeChange] = set()
    for dimension in result.kept:
        if not sizes_of[dimension.name]:
            rows[dimension.role, dimension.size, dimension.reason] += 1
        for change in sizes_of[dimension.name]:
            if change.after == change.before and change not in told:
                rows[change.role, change.before, dimension.reason] += 1
            told.add(change)
    return [SizeRow(role, counted(role, count), size, size, why=why) for (role, size, why), count in rows.items()]
