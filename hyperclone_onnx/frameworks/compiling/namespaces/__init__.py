"""An array namespace for each framework: the Python array API standard and what else the operators need.

A namespace is a module. Beyond the standard it has `attend`, `convolution`, `device_of`, `dtype_named`, `dtype_of`,
`einsum`, `erf`, `expm1`, `lift`, `log_softmax`, `logsumexp`, `loop`, `numbers`, `relu`, `scan`, `scatter`, `sigmoid`,
`softmax`, `softplus` and `branch`.
"""

from __future__ import annotations

import onnx_ir as ir


def dtype_name(number: int) -> str:
    """What the array API calls an ONNX element type."""
    return str(ir.DataType(number).numpy().name)
