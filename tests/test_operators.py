"""Every operator has a rule or is pinned on purpose, but for those listed here."""

from __future__ import annotations

import onnxruntime.capi.onnxruntime_pybind11_state as runtime

import hyperclone_onnx.rules
from hyperclone_onnx.rules import registry

assert hyperclone_onnx.rules  # importing it registers the rules

CONTRIB_NOT_YET = set(
    "DequantizeBFP DequantizeLinear DequantizeWithOrder DynamicQuantizeLSTM DynamicQuantizeMatMul "
    "GatherBlockQuantized GemmFloat8 MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4 "
    "MatMulFpQ4 MatMulInteger16 MatMulIntegerToFloat MatMulNBits MatMulNBitsMlp MatMulNBitsQkv MulInteger "
    "QAttention QEmbedLayerNormalization QGemm QLinearAdd QLinearAveragePool QLinearConcat QLinearConv "
    "QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax "
    "QLinearWhere QMoE QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention "
    "QOrderedMatMul QuantizeBFP QuantizeLinear QuantizeWithOrder ReduceSumInteger".split()
)
"""They compute on codes with scales."""


def test_contrib_operators_are_ruled_or_pinned() -> None:
    domain = "com.microsoft"
    every = {schema.name for schema in runtime.get_all_operator_schema() if schema.domain == domain}
    told = {name for name in every if registry.relation(domain, name) or registry.pin_reason(domain, name)}
    assert every - told == CONTRIB_NOT_YET & every
    assert not told & CONTRIB_NOT_YET
