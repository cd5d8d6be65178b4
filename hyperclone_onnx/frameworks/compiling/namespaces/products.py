"""A namespace in which products of matrices take their operands in another type than all else."""

from __future__ import annotations

from typing import Any


class WithProductsIn:
    """The functions of a namespace; products, convolutions and the products of an attention run in a given type.

    Operands are cast to the type, and the result is cast back to the type that it would have had. So sums over a whole
    width, norms, softmaxes and the residual stream keep their precision, forward and backward. Integers stay as they
    are.

    Args:
        namespace: the namespace of a framework.
        dtype: the type of products, one of the framework's types.
    """

    def __init__(self, namespace: Any, dtype: Any) -> None:
        self._namespace = namespace
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._namespace, name)

    def matmul(self, a: Any, b: Any) -> Any:
        """The product of matrices."""
        return self._product(self._namespace.matmul, a, b)

    def einsum(self, equation: str, *operands: Any) -> Any:
        """The sum that an equation writes."""
        return self._product(lambda *cast: self._namespace.einsum(equation, *cast), *operands)

    def grouped_matmul(self, rows: Any, weight: Any, sizes: Any) -> Any:
        """The products of groups of rows."""
        return self._product(lambda *cast: self._namespace.grouped_matmul(*cast, sizes), rows, weight)

    def convolution(self, x: Any, w: Any, *options: Any) -> Any:
        """The convolution."""
        return self._product(lambda *cast: self._namespace.convolution(*cast, *options), x, w)

    def attend(self, *operands: Any, **options: Any) -> Any:
        """Attention, with a softmax in the type of its operands."""
        from hyperclone_onnx.frameworks.compiling.ops.attention import attend

        return attend(self, *operands, **options)

    def _product(self, multiply: Any, *operands: Any) -> Any:
        xp = self._namespace
        if not all(xp.isdtype(operand.dtype, "real floating") for operand in operands):
            return multiply(*operands)
        result = xp.result_type(*operands)
        return multiply(*(operand.astype(self._dtype) for operand in operands)).astype(result)
