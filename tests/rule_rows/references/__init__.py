"""Operators that ONNX Runtime has on other devices only, written out from their specification, in numpy."""

from rule_rows.references import attention, grouped_attention, operators, positions, quantised, recurrences
from rule_rows.references.registry import REFERENCES

__all__ = ["REFERENCES", "attention", "grouped_attention", "operators", "positions", "quantised", "recurrences"]
