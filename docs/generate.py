"""Write the generated pages of docs/: `python docs/generate.py [--check]`.

zoo.md has the dimensions that were found in each family. operators.md says how the axes of each operator relate, or why
they keep their size.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import onnx
import onnxruntime
import onnxruntime.capi.onnxruntime_pybind11_state as runtime

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hyperclone_onnx.rules  # noqa: E402, F401 - importing it registers the rules
from hyperclone_onnx import analyse  # noqa: E402
from hyperclone_onnx.reports.inspection import grouped_tensors, tensor_axes  # noqa: E402
from hyperclone_onnx.rules import registry  # noqa: E402
from models import zoo_store  # noqa: E402

COLUMNS = ("hidden", "heads", "group", "head_dim", "ffn", "width", "vocab", "positions")


def zoo_entry(name: str, folder: Path) -> tuple[str, str]:
    """The row of a graph, and the axes of its named tensors."""
    path = folder / f"{name}.onnx"
    onnx.save(zoo_store.load(name), path)
    analysis = analyse(path)
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for dimension in analysis.named:
        sizes[dimension.role][f"{dimension.size}{'' if dimension.dim.growable else ' kept'}"] += 1
    cells = " | ".join(
        ", ".join(f"{size} x{count}" if count > 1 else size for size, count in sizes[role].items()) for role in COLUMNS
    )
    if not name.endswith(".distinct"):
        return f"| {name} | {cells} |", ""
    family = name.removesuffix(".distinct")
    lines = grouped_tensors(tensor_axes(analysis))
    named = [line for line in lines if not line.startswith(("val_", "permute", "t_"))]
    return f"| {family} | {cells} |", f"### {family}\n\n```text\n" + "\n".join(named) + "\n```\n"


def zoo_names() -> list[str]:
    """All graphs but the second sizings."""
    return [name for name in zoo_store.names() if not name.endswith(".collide")]


def zoo_page() -> str:
    """A row for each graph but the second sizings, then the axes of the families' tensors."""
    with tempfile.TemporaryDirectory() as folder:
        entries = {name: zoo_entry(name, Path(folder)) for name in zoo_names()}
    rows = [row for row, detail in entries.values() if detail]
    others = [row for row, detail in entries.values() if not detail]
    details = [detail for _, detail in entries.values() if detail]
    headers = [f"| {kind} | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}" for kind in ("family", "graph")]
    return (
        "# The dimensions that were found in the zoo\n\n"
        "Written by `make docs`. Each graph is a small random model exported by `torch.onnx.export(dynamo=True)`.\n"
        "The sizes were found from the structure of the graph alone. A size followed by *x2* occurs as two dimensions\n"
        "(one for each layer, for example). *kept* means that a size cannot grow: values index it, or a softmax runs\n"
        "over it. `group` is the number of query heads for each key/value head.\n\n"
        + "\n".join([headers[0], *rows])
        + "\n\n## From other exporters, fused, built by hand\n\n"
        "`cached` and `torchscript` are optimum's exports with and without key/value caches. `fused` and `extended`\n"
        "are such exports after ONNX Runtime's transformers optimizer, or after one of its sessions. `built` graphs\n"
        "are written by hand (routed experts, state spaces, latent attention, operators of opsets 23 and 24, ONNX\n"
        "Runtime's own). If an operator has no rule yet, more is *kept* than necessary.\n\n"
        + "\n".join([headers[1], *others])
        + "\n\n## The axes of the named tensors\n\n"
        "`a.*.b x2` stands for two equal layers. Brackets contain the factors of one axis, the outermost first. `+`\n"
        "joins segments. *and* separates the uses of a tensor that is stored once.\n\n" + "\n".join(details)
    )


DOMAINS = {
    "": "ONNX",
    "ai.onnx.ml": "ONNX, classical machine learning",
    "ai.onnx.preview": "ONNX, previews",
    "ai.onnx.preview.training": "ONNX, training previews",
    "com.microsoft": "ONNX Runtime",
}


def operator_versions() -> dict[str, dict[str, list[int]]]:
    """The versions in which each operator of the installed onnx and of ONNX Runtime's own domain came or changed."""
    versions: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for schema in onnx.defs.get_all_schemas_with_history():
        versions[schema.domain][schema.name].append(schema.since_version)
    ruled = {*registry.ruled(), *registry.pinned_operators()}
    for schema in runtime.get_all_operator_schema():
        own = schema.domain == "com.microsoft" or (schema.domain, schema.name) in ruled
        if own and schema.since_version not in versions[schema.domain][schema.name]:
            versions[schema.domain][schema.name].append(schema.since_version)
    for domain, op_type in ruled:
        versions[domain].setdefault(op_type, [])
    return versions


def operator_row(domain: str, op_type: str, versions: list[int]) -> tuple[str, str]:
    """An operator's status and its row of the table."""
    relation, reason = registry.relation(domain, op_type), registry.pin_reason(domain, op_type)
    if reason is not None:
        status, text = "pinned on purpose", reason
    elif relation is None:
        status, text = "no rule yet", ""
    else:
        status = "elementwise" if relation.__module__.endswith(".elementwise") else "ruled"
        text = (relation.__doc__ or "").strip().split("\n\n")[0]
    text = re.sub(r"\s+", " ", text).replace("|", "\\|")
    edited = "yes" if registry.edit(domain, op_type) else ""
    return status, f"| {op_type} | {status} | {' '.join(map(str, sorted(versions)))} | {text} | {edited} |"


def operators_page() -> str:
    """A table for each domain: every operator, its status, and its rule's equation or why it is pinned."""
    header = "| operator | status | since | how its axes relate, or why it is pinned | edited |\n" + "|---" * 5
    tables = []
    versions = operator_versions()
    for domain in sorted(versions, key=lambda name: list(DOMAINS).index(name) if name in DOMAINS else len(DOMAINS)):
        rows = [operator_row(domain, op_type, since) for op_type, since in sorted(versions[domain].items())]
        counts = Counter(status for status, _ in rows)
        counted = ", ".join(f"{count} {status}" for status, count in counts.most_common())
        title = f"## {DOMAINS.get(domain, domain)} (`{domain or 'ai.onnx'}`)"
        tables.append(f"{title}\n\n{counted}.\n\n{header}|\n" + "\n".join(row for _, row in rows) + "\n")
    return (
        "# The operators\n\n"
        f"Written by `make docs` from the registry, for every operator of onnx {onnx.__version__} and of\n"
        f"ONNX Runtime {onnxruntime.__version__}.\n\n"
        "* *ruled*: the rule says how the axes of its operands and results relate;\n"
        "* *elementwise*: the operator treats each element by itself, and is a name in a table;\n"
        "* *pinned on purpose*: every axis that it touches keeps its size, for the reason given;\n"
        "* *no rule yet*: the same, because there is no rule, and the report says so.\n\n"
        "*since* lists the opset versions in which an operator came or changed. *edited* marks operators whose\n"
        "attributes or integer inputs change when their axes grow.\n\n" + "\n".join(tables)
    )


PAGES = {"zoo.md": zoo_page, "operators.md": operators_page}


def main() -> int:
    """Write the pages, or with --check print which pages are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{name}: {'out of date, run `make docs`' if check else 'written'}")
            if not check:
                path.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
