"""An array namespace for each framework: the Python array API standard and further functions for the operators.

A namespace is a module. Besides the functions of the standard it has `attend`, `branch`, `convolution`, `device_of`,
`dtype_named`, `dtype_of`, `einsum`, `erf`, `expm1`, `fixed`, `lift`, `log_softmax`, `logsumexp`, `loop`, `numbers`,
`relu`, `scan`, `scatter`, `sigmoid`, `softmax` and `softplus`.
"""

from __future__ import annotations

import onnx_ir as ir


def dtype_name(number: int) -> str:
    """The array API's name of an ONNX element type."""
    return str(ir.DataType(number).numpy().name)
