"""ONNX's own backend node tests, run on each framework's namespace.

`python -m tests.node_cases` writes the counts into docs/handoff.md.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

Array = np.ndarray[Any, Any]

SEVERAL = "several"

FRAMEWORKS = ("numpy", "torch", "jax")

EXCLUDED: dict[str, str] = {
    "test_affine_grid_*_expanded": "its sizes depend on an If",
    "test_batchnorm_*_training_mode": "batch statistics: the handoff is of an inference graph",
    "test_training_dropout*": "dropout in training mode: the handoff is of an inference graph",
    "test_bernoulli*": "random",
    "test_reduce_m??_empty_set*": "the maximum of an empty tensor: no framework has it",
    "test_scan_sum": "Scan of opset 8, which has a batch of its own",
    "test_not_?d": "opset 1: elementwise operators broadcast by attributes before opset 7",
    "test_*_string*": "strings",
}
"""Cases of covered operators that are refused, or not applicable, in every framework; with the reason."""

EXCLUDED_IN: dict[str, dict[str, str]] = {
    "numpy": {
        "test_einsum_*_bfloat16": "NumPy's einsum has no bfloat16",
        "test_attention_*_bf16*": "NumPy widens bfloat16 beside a Python number",
        "test_celu_bfloat16*": "NumPy widens bfloat16 beside a Python number",
    },
    "torch": {
        f"test_*_uint{bits}*": "PyTorch has few operators for unsigned types wider than a byte" for bits in (16, 32, 64)
    }
    | {"test_bitwise_not_3d": "PyTorch has few operators for unsigned types wider than a byte"},
    "jax": {
        "test_dynamicquantizelinear_expanded": "XLA rounds the scale differently, and one number lies between two codes"
    },
}
"""Cases that are not applicable to one framework."""

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""The rounding errors of narrow types. The tolerance of the cases is meant for float32."""


def reason(framework: str, name: str) -> str | None:
    """The reason why a case is left out; None if it is not."""
    for table in (EXCLUDED, EXCLUDED_IN[framework]):
        for glob, why in table.items():
            if fnmatchcase(name, glob):
                return why
    return None


@cache
def cases() -> tuple[Any, ...]:
    """All node tests of ONNX."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases divide by zero on purpose when they are built
        return tuple(load_model_tests(kind="node"))


@cache
def cases_by_operator() -> dict[str, list[Any]]:
    """The cases of covered operators: by operator, and under SEVERAL those of functions that are written out."""
    from hyperclone_onnx.frameworks.compiling import registry
    from hyperclone_onnx.frameworks.compiling.preparation import CONTROL, TYPES

    by_operator: dict[str, list[Any]] = defaultdict(list)
    covered = set(registry.covered())
    for case in cases():
        operators = {("" if n.domain == "ai.onnx" else n.domain, n.op_type) for n in case.model.graph.node}
        if operators <= covered | {("", name) for name in (*CONTROL, "Constant")} and _types(case.model) <= set(TYPES):
            by_operator[case.model.graph.node[0].op_type if len(case.model.graph.node) == 1 else SEVERAL].append(case)
    return dict(by_operator)


def _types(model: onnx.ModelProto) -> set[ir.DataType]:
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    return {
        ir.DataType(v.type.tensor_type.elem_type) if v.type.HasField("tensor_type") else ir.DataType.UNDEFINED
        for v in values
    }


def check(case: Any, framework: str) -> None:
    """Run one case and compare. Raises AssertionError if the results differ, and Refused if it has no handoff."""
    for inputs, expected in case.data_sets:
        actual = run(ir.from_proto(case.model), framework, [_array(value) for value in inputs])
        for got, want in zip(actual, map(_array, expected), strict=True):
            _compare(got, want, case.rtol, case.atol)


def run(model: ir.Model, framework: str, inputs: list[Array]) -> list[Array]:
    """The outputs that a framework computes for a model's inputs, in 64 bits if the model has such types."""
    from hyperclone_onnx.frameworks.compiled_model import compile_model
    from hyperclone_onnx.frameworks.compiling.application import Application
    from hyperclone_onnx.frameworks.compiling.naming import nested

    with _wide(framework):
        compiled = compile_model(model)
        tensors = {w.path: _put(framework, compiled.tensors[w.initializer].numpy()) for w in compiled.program.weights}
        apply = Application(compiled.program, nested(tensors), framework)
        outputs = apply({}, *(_put(framework, array) for array in inputs))
        return [_get(framework, array) for array in (outputs.values() if isinstance(outputs, dict) else [outputs])]


def _compare(got: Array, want: Array, rtol: float, atol: float) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    rtol = max(rtol, 4 * EPSILON.get(want.dtype.name, 0.0))
    if want.dtype.name == "bfloat16":
        got, want = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=rtol, atol=atol)


def _wide(framework: str) -> AbstractContextManager[Any]:
    if framework != "jax":
        return nullcontext()
    import jax

    return jax.enable_x64(True)  # type: ignore[no-any-return]


def _array(value: Any) -> Array:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _put(framework: str, array: Array) -> Any:
    if framework == "numpy":
        return array
    if framework == "torch":
        from hyperclone_onnx.frameworks.torch import as_torch

        return as_torch(array.copy())
    import jax

    return jax.numpy.asarray(array)


def _get(framework: str, array: Any) -> Array:
    if framework == "torch":
        import torch

        if array.dtype == torch.bfloat16:
            return np.asarray(array.view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy()))
    return np.asarray(array)


def outcomes(framework: str) -> Counter[str]:
    """The number of cases of covered operators that pass, and of those that are left out, by reason."""
    counts: Counter[str] = Counter()
    named = {case.name: case for group in cases_by_operator().values() for case in group}
    for name, case in named.items():
        why = reason(framework, name)
        if why is None:
            check(case, framework)
        counts[why or "pass"] += 1
    return counts


BEGIN, END = "<!-- node tests -->", "<!-- /node tests -->"


def table() -> Iterator[str]:
    """The numbers as Markdown."""
    counts = {framework: outcomes(framework) for framework in FRAMEWORKS}
    yield f"| | {' | '.join(FRAMEWORKS)} |\n|---|{'---|' * len(FRAMEWORKS)}"
    reasons = sorted({why for counter in counts.values() for why in counter} - {"pass"})
    for label, key in (("**pass**", "pass"), *((f"left out: {why}", why) for why in reasons)):
        yield f"| {label} | {' | '.join(str(counter[key] or '') for counter in counts.values())} |"


def main() -> None:
    """Write the numbers into the page."""
    page = Path(__file__).resolve().parent.parent / "docs" / "handoff.md"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n" + "\n".join(table()) + f"\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
