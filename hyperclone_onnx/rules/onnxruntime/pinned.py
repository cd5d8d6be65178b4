"""ONNX Runtime's own operators that keep the size of every axis they touch."""

from __future__ import annotations

from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.registry import pinned

pinned(
    "generation runs its subgraphs in a loop, with caches that it makes itself",
    *("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"),
    domain=MICROSOFT,
)
pinned("compiled for one device, in the sizes it has", "EPContext", "Snpe", domain=MICROSOFT)
pinned(
    "it matches, counts or hashes runs of tokens",
    *("BifurcationDetector", "NGramHashMapping", "VarlenNGramHashMapping", "NGramRepeatBlock", "Tokenizer"),
    domain=MICROSOFT,
)
pinned(
    "it ranks compressed keys, whose states lie in layouts of its own",
    *("SparseAttentionIndexer", "PackedSparseAttentionIndexer"),
    domain=MICROSOFT,
)
pinned("its elements are sorted and deduplicated", "Unique", domain=MICROSOFT)
pinned("its path runs along both axes", "DynamicTimeWarping", domain=MICROSOFT)
pinned("its gates, its memory and its attention lie in one recurrence", "AttnLSTM", domain=MICROSOFT)
pinned("its words are windows of characters", "WordConvEmbedding", domain=MICROSOFT)
pinned("its mask has the image's own axes", "MaxpoolWithMask", domain=MICROSOFT)
pinned("a sparse tensor is stored by its places", "SparseToDenseMatMul", domain=MICROSOFT)
pinned(
    "its weights are packed in a form of their own",
    *("DequantizeBFP", "QuantizeBFP", "DequantizeWithOrder", "QuantizeWithOrder", "MatMulFpQ4", "GemmFloat8"),
    domain=MICROSOFT,
)
pinned(
    "its codes lie in an order of one device",
    *("QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization", "QOrderedLongformerAttention"),
    "QOrderedMatMul",
    domain=MICROSOFT,
)
