"""In each framework, every operator of the table passes ONNX's own node tests."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("array_api_compat")

from hyperclone_onnx.errors import HypercloneError  # noqa: E402
from hyperclone_onnx.frameworks.compiling import registry  # noqa: E402
from hyperclone_onnx.frameworks.compiling.preparation import CONTROL  # noqa: E402
from tests import node_cases  # noqa: E402

OPERATORS = [op_type for domain, op_type in registry.covered() if not domain] + list(CONTROL)
WITHOUT_CASES = {
    "Optional",  # its cases have sequences
    "Not",  # the tests for it have opset 1; it occurs in functions that are written out
    "SimplifiedLayerNormalization",  # an operator of ONNX Runtime, in the default domain
}


@pytest.mark.parametrize("framework", node_cases.FRAMEWORKS)
@pytest.mark.parametrize("op_type", [*OPERATORS, node_cases.SEVERAL])
def test_node_cases(op_type: str, framework: str) -> None:
    if framework != "numpy":
        pytest.importorskip(framework)
    group = node_cases.cases_by_operator().get(op_type, [])
    supported = [case for case in group if node_cases.reason(framework, case.name) is None]
    problems = []
    for case in supported:
        try:
            node_cases.check(case, framework)
        except Exception as problem:  # whatever the exception is, it belongs to this case
            problems.append(f"{case.name}: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
    assert problems == []
    assert supported or op_type in WITHOUT_CASES, "no case asks this operator"


def test_cases_that_are_left_out_everywhere_are_refused_or_cannot_run() -> None:
    named = {case.name: case for case in node_cases.cases()}
    for name, case in named.items():
        if any(node_cases.fnmatchcase(name, glob) for glob in node_cases.EXCLUDED):
            with pytest.raises((HypercloneError, ValueError, TypeError, AssertionError, KeyError)):
                node_cases.check(case, "numpy")


def test_every_exclusion_names_a_case() -> None:
    names = [case.name for case in node_cases.cases()]
    for globs in (node_cases.EXCLUDED, *node_cases.EXCLUDED_IN.values()):
        for glob in globs:
            assert any(node_cases.fnmatchcase(name, glob) for name in names), glob
