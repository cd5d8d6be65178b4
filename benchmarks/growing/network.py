"""The trained model: a Llama over bytes or over the tokens of a small vocabulary, small enough for a CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

BYTES = 256
HEAD = 16
OPSET = 20


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. A head has 16 channels."""

    width: int
    attention: int
    """The width of all heads together."""
    ffn: int
    layers: int = 3
    length: int = 128
    """Bytes (or tokens) of context."""
    vocabulary: int = BYTES

    def multiplied(self) -> int:
        """The number of weights in matrix products: all matrices except the embedding."""
        return self.vocabulary * self.width + self.layers * self.width * (4 * self.attention + 3 * self.ffn)

    def flops(self) -> int:
        """The FLOPs of training on one byte: 6 for each weight, and 12 for each attention channel and byte of context.

        The backward pass costs twice the forward pass (Kaplan et al., arXiv 2001.08361, table 1).
        """
        return 6 * self.multiplied() + 12 * self.layers * self.attention * self.length


def shape(width: int, **other: int) -> Shape:
    """The usual shape: all heads together are as wide as the residual stream, the feed-forward four times."""
    return Shape(width, width, 4 * width, **other)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Layer(nn.Module):
    def __init__(self, width: int, attention: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(width), Norm(width)
        self.q, self.k, self.v = (nn.Linear(width, attention, bias=False) for _ in range(3))
        self.o = nn.Linear(attention, width, bias=False)
        self.gate, self.up = nn.Linear(width, ffn, bias=False), nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        batch, length, _ = x.shape
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).view(batch, length, layer.out_features // HEAD, HEAD).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, self.o.in_features))
        normed = self.ffn_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: Any, cos: Any, sin: Any) -> Any:
    one, other = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-other, one), dim=-1) * sin


class Network(nn.Module):
    """Predicts the logits of the next byte or token: (batch, length) -> (batch, length, vocabulary)."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.attention, shape.ffn) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.register_buffer("frequencies", 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                spread = 0.02 if name.startswith("embedding") else parameter.shape[1] ** -0.5
                if name.endswith(("o.weight", "down.weight")):
                    spread *= (2 * shape.layers) ** -0.5
                nn.init.normal_(parameter, std=spread, generator=generator)
            else:
                # Gains of exactly 1 would be lost: the exporter merges equal tensors and drops products with 1.
                nn.init.normal_(parameter, mean=1.0, std=0.01, generator=generator)

    def forward(self, input_ids: Any) -> Any:
        x = self.embedding(input_ids)
        angles = torch.arange(input_ids.shape[1])[:, None] * torch.cat((self.frequencies, self.frequencies))
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


def export(shape: Shape, seed: int, path: Path) -> None:
    """Export a model with random weights: normal, variance 1 / fan-in, and less for outputs to the residual stream."""
    network = Network(shape, seed).eval()
    dynamic = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=shape.length)}}
    ids = torch.zeros((2, shape.length // 2), dtype=torch.int64)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network,
            (ids,),
            dynamo=True,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes=dynamic,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        program.save(path)
