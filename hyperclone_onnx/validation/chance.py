"""Models that draw random numbers: both models compute with the same draws, so that their outputs can be compared.

The source is run once with its draws as additional outputs. In the copies that are compared, each draw is an input of
the same name. Numbers that are drawn in the body of a loop or a branch cannot be given so: the outputs that depend on
them are not compared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from hyperclone_onnx.graphs import RANDOM, bodies_of, captured_values, describe
from hyperclone_onnx.validation.inputs.search import Accepted


def draws_of(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes outside of bodies that draw random numbers, by the name of what they draw."""
    return {node.outputs[0].name or "": node for node in model.graph if node.op_type in RANDOM and not node.domain}


def shared_draws(source: ir.Model, grown: ir.Model) -> dict[str, ir.DataType]:
    """The draws that both models can be given, and their types."""
    others = draws_of(grown) if draws_of(source) else {}
    return {
        name: node.outputs[0].dtype
        for name, node in draws_of(source).items()
        if name in others and node.outputs[0].dtype is not None and not node.outputs[0].is_graph_output()
    }


def with_draws_shown(model: ir.Model, draws: Mapping[str, ir.DataType]) -> ir.Model:
    """A copy of a model that gives its draws as well."""
    copy = model.clone()
    copy.graph.outputs.extend(node.outputs[0] for name, node in draws_of(copy).items() if name in draws)
    return copy


def take_draws_as_inputs(model: ir.Model, draws: Mapping[str, ir.DataType]) -> None:
    """Turn each of these draws of a model into an input of the same name."""
    for name, node in draws_of(model).items():
        if name in draws:
            given = ir.Value(name=name, type=ir.TensorType(draws[name]))
            node.outputs[0].replace_all_uses_with(given)
            model.graph.remove(node, safe=True)
            model.graph.inputs.append(given)


def with_draws_fed(accepted: Sequence[Accepted], shown: Sequence[Accepted]) -> tuple[Accepted, ...]:
    """Input sets with the draws of the source among the inputs.

    Args:
        accepted: the input sets on which the source ran.
        shown: the same for its copy that gives its draws as well.
    """
    result = []
    for plain, other in zip(accepted, shown, strict=True):
        draws = {name: array for name, array in other.outputs.items() if name not in plain.outputs}
        outputs = {name: other.outputs[name] for name in plain.outputs}
        result.append(Accepted(replace(plain.case, feeds={**plain.case.feeds, **draws}), outputs))
    return tuple(result)


def beyond_comparison(source: ir.Model, draws: Collection[str]) -> dict[str, str]:
    """The outputs that depend on draws which cannot be given to both models, and who draws."""
    reasons: dict[ir.Value, str] = {}
    for node in source.graph:
        inside = [inner for body in bodies_of(node) for inner in body.all_nodes()]
        nodes = inside if node.outputs[0].name in draws else [node, *inside]
        own = [one for one in nodes if one.op_type in RANDOM and not one.domain]
        captured = [value for value in (*node.inputs, *captured_values(node)) if value in reasons]
        if own:
            where = "" if own[0] is node else f", within {describe(node)}"
            reasons.update(dict.fromkeys(node.outputs, f"{describe(own[0])}{where}"))
        elif captured:
            reasons.update(dict.fromkeys(node.outputs, reasons[captured[0]]))
    return {value.name or "": reasons[value] for value in source.graph.outputs if value in reasons}
