"""The formats in which ``handoff --to`` writes weights. The command line imports this module: import nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["pytorch", "jax", "safetensors", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
