"""Makes the imports of a model consistent: each domain has one name and one version."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from hyperclone_onnx.errors import BadModel, Refused
from hyperclone_onnx.graphs import DEFAULT_DOMAIN, canonical_domain

OLDEST_OPSET = 7
"""Before this, elementwise operators broadcast along an axis given as an attribute."""

OPSET_FOR_GROWTH = 17
"""The opset for models without a node of ONNX's own domain, since growth may insert such nodes (Mul, Gather, ...)."""


def settle_opsets(model: ir.Model) -> None:
    """Make the imports of a model, and those of its functions, complete and agree with each other.

    A file may spell ONNX's own domain "ai.onnx", and ONNX Runtime's optimizer forgets to import the domains of nodes
    that it made.

    Raises:
        BadModel: one domain is imported in two versions.
        Refused: the version of ONNX's own operators is too old or missing, or a function has another version.
    """
    imports = model.graph.opset_imports
    for one in (imports, *(function.opset_imports for function in model.functions.values())):
        _spell(one)
    domains = {node.domain for node in model.graph.all_nodes()}
    for domain in domains - {DEFAULT_DOMAIN}:
        imports.setdefault(domain, 1)
    if DEFAULT_DOMAIN not in imports and DEFAULT_DOMAIN in domains:
        raise Refused("it has operators of ONNX itself but does not say of which opset: add it to opset_import")
    functions = [function.opset_imports for function in model.functions.values()]
    versions = [imports[DEFAULT_DOMAIN] for imports in functions if DEFAULT_DOMAIN in imports]
    imports.setdefault(DEFAULT_DOMAIN, versions[0] if versions else OPSET_FOR_GROWTH)
    opset = imports[DEFAULT_DOMAIN]
    if opset < OLDEST_OPSET:
        raise Refused(f"opset {opset} is too old (before {OLDEST_OPSET}): convert it with onnx.version_converter")
    for function in model.functions.values():
        take_over_versions(function, imports)


def _spell(imports: dict[str, int]) -> None:
    """Replace other spellings of a domain."""
    for domain, version in list(imports.items()):
        own = canonical_domain(domain)
        if own == domain:
            continue
        if imports.get(own, version) != version:
            raise BadModel(f"it imports two opsets of ONNX's own operators, {imports[own]} and {version}")
        del imports[domain]
        imports[own] = version


def take_over_versions(function: ir.Function, imports: dict[str, int]) -> None:
    """Let a function import the versions of its model, if its operators are the same in both versions.

    Raises:
        Refused: an operator of the function is not the same.
    """
    for domain, version in function.opset_imports.items():
        wanted = imports.get(domain, version)
        if wanted == version:
            continue
        for node in function.all_nodes():
            if node.domain == domain and _form(node, version) != _form(node, wanted):
                raise Refused(
                    f"function {function.name!r} uses opset {version}, its model opset {wanted}, and {node.op_type} "
                    "changed between the two: inline it with onnx.inliner.inline_local_functions(convert_version=True)"
                )
        function.opset_imports[domain] = wanted


def _form(node: ir.Node, version: int) -> int | None:
    """The opset in which an operator got its form of this version. None for an operator without a schema."""
    try:
        return int(onnx.defs.get_schema(node.op_type, version, node.domain).since_version)
    except onnx.defs.SchemaError:
        return None
