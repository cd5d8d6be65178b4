"""ONNX Runtime's own operators that keep the size of every axis they touch."""

from __future__ import annotations

from hyperclone_onnx.graphs import MICROSOFT
from hyperclone_onnx.rules.registry import pinned

pinned(
    "it runs its subgraphs in a loop, with caches that it makes itself",
    *("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"),
    domain=MICROSOFT,
)
pinned("it is compiled for one device, with fixed sizes", "EPContext", "Snpe", domain=MICROSOFT)
pinned(
    "it matches, counts or hashes runs of tokens",
    *("BifurcationDetector", "NGramHashMapping", "VarlenNGramHashMapping", "NGramRepeatBlock", "Tokenizer"),
    domain=MICROSOFT,
)
pinned(
    "it ranks compressed keys, and stores them in its own layout",
    *("SparseAttentionIndexer", "PackedSparseAttentionIndexer"),
    domain=MICROSOFT,
)
pinned("it sorts its elements and removes duplicates", "Unique", domain=MICROSOFT)
pinned("its path runs along both axes", "DynamicTimeWarping", domain=MICROSOFT)
pinned("its gates, its memory and its attention are parts of one recurrence", "AttnLSTM", domain=MICROSOFT)
pinned("its words are windows of characters", "WordConvEmbedding", domain=MICROSOFT)
pinned("its mask has the axes of the image", "MaxpoolWithMask", domain=MICROSOFT)
pinned("a sparse tensor is stored with the indices of its elements", "SparseToDenseMatMul", domain=MICROSOFT)
pinned(
    "its weights are packed in a format of their own",
    *("DequantizeBFP", "QuantizeBFP", "DequantizeWithOrder", "QuantizeWithOrder", "MatMulFpQ4", "GemmFloat8"),
    domain=MICROSOFT,
)
pinned(
    "its codes are laid out for one device",
    *("QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization", "QOrderedLongformerAttention"),
    "QOrderedMatMul",
    domain=MICROSOFT,
)
