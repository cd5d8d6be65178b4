"""The description of a feed-forward block, as a plan records it.

`analysis.feed_forward` finds blocks and describes them. A transform reads the description, and needs no analysis.
All names are those of values of the graph that the transform is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Projection:
    """A product with a stored weight, with or without a bias.

    Args:
        reads: the value that the product reads.
        gives: the value that the product gives, with its bias.
        weight: the stored weight. Axes of the size 1, such as those of a convolution, do not count.
        transposed: whether the weight's first axis is the output's.
        bias: the stored bias.
        parts: how many values of the width of the block lie side by side on the axis of the block's hidden units, such
            as the gate and the other half of a product that computes both.
        scale: the number that multiplies the product, without the bias.
        bias_scale: the number that multiplies the bias.
    """

    reads: str
    gives: str
    weight: str
    transposed: bool
    bias: str | None = None
    parts: int = 1
    scale: float = 1.0
    bias_scale: float = 1.0


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: products into its hidden units, functions of single units, and a product out of them.

    Args:
        name: the name of the block in messages.
        reads: the value that the block reads.
        gives: the value that the block gives: what it adds to the stream, perhaps before a norm.
        axis: the axis of the features in both.
        rank: the number of axes of both.
        hidden: the number of features of the stream.
        ffn: the number of hidden units.
        ups: the products into the hidden units.
        down: the product out of them.
        vectors: the stored tensors that have a number for each hidden unit, with their `parts`.
        split: the values that are one of several parts of a value, each with (number of the part, number of parts).
        activation: the name that ONNX Runtime's operator MoE has for the function of the hidden units; empty where
            nobody asked for it.
        gate: which of two parts is the gate of a gated function.
    """

    name: str
    reads: str
    gives: str
    axis: int
    rank: int
    hidden: int
    ffn: int
    ups: tuple[Projection, ...]
    down: Projection
    vectors: Mapping[str, int] = field(default_factory=dict)
    split: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    activation: str = ""
    gate: int = 0

    def to_json(self) -> dict[str, Any]:
        """The description as plain data."""
        data = asdict(self)
        data["ups"], data["down"] = [_plain(up) for up in self.ups], _plain(self.down)
        data["vectors"] = dict(self.vectors)
        data["split"] = {name: list(part) for name, part in self.split.items()}
        unused = {"activation", "gate"} if not self.activation else set()
        return {key: value for key, value in data.items() if value != {} and key not in unused}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> FeedForward:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: the data describes no block.
        """
        others = {key: data[key] for key in ("name", "reads", "gives", "axis", "rank", "hidden", "ffn")}
        return FeedForward(
            **others,
            ups=tuple(Projection(**up) for up in data["ups"]),
            down=Projection(**data["down"]),
            vectors=dict(data.get("vectors", {})),
            split={name: (part, parts) for name, (part, parts) in data.get("split", {}).items()},
            activation=data.get("activation", ""),
            gate=data.get("gate", 0),
        )


def _plain(projection: Projection) -> dict[str, Any]:
    """A projection as plain data, without what is as usual."""
    usual = Projection("", "", "", False)
    data = asdict(projection)
    kept = ("reads", "gives", "weight", "transposed")
    return {key: value for key, value in data.items() if key in kept or value != getattr(usual, key)}
