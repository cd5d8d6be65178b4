"""Operators that ONNX Runtime does not have on the CPU, in numpy, from their specifications."""

from rule_rows.references import attention, grouped_attention, operators, positions, quantised, recurrences
from rule_rows.references.registry import REFERENCES

__all__ = ["REFERENCES", "attention", "grouped_attention", "operators", "positions", "quantised", "recurrences"]
