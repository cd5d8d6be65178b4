"""The formats in which ``handoff --to`` writes weights; imported by the command line, so it imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["pytorch", "jax", "safetensors", "hf"]
TARGETS: tuple[Target, ...] = get_args(Target)
