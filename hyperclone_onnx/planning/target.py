"""Takes the sizes to grow to from another model: a Hugging Face configuration, or an ONNX file of the same family."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hyperclone_onnx.analysis.analysing import Analysis, analyse
from hyperclone_onnx.analysis.quantities import SIZE_ROLES, Quantity, quantities
from hyperclone_onnx.errors import BadModel, BadRequest, Refused, printable
from hyperclone_onnx.layers.stacks import find_stacks
from hyperclone_onnx.layers.unfusing import unfuse

FIELDS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn": (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "ffn_hidden_size",
        "d_ff",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "hidden_dim",
    ),
    "heads": (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "encoder_attention_heads",
        "decoder_attention_heads",
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv", "kv_channels", "attention_head_size"),
    "layers": (
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    ),
    "vocab": ("vocab_size",),
}
"""The names of each size in the configurations of transformers. Of several fields, all must agree."""

COMPARED = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "layers", "vocab")
"""The sizes of the comparison, in its order."""

IGNORED_SETTINGS = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path")
"""Fields that do not say what a model computes."""


@dataclass(frozen=True)
class Target:
    """Another model, as far as its sizes matter.

    Args:
        path: the file.
        sizes: its sizes by role; also "layers" and "vocab".
        settings: all other fields of its configuration.
        operators: the operators of its graph, of an ONNX file.
    """

    path: Path
    sizes: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    operators: frozenset[str] | None = None


@dataclass(frozen=True)
class Compared:
    """One size of the source, of the target and of the result. None where it is not known, or there is none."""

    role: str
    source: int | None
    target: int | None
    result: int | None


@dataclass(frozen=True)
class Likeness:
    """What a target asks for.

    Args:
        path: the target's file.
        sizes: the requested sizes, by role or by the name of a dimension.
        target: the target's sizes.
        differences: what the target has and the result will not have, one sentence each.
        layers: the number of layers of the source and of the result; None where it is not known.
    """

    path: str
    sizes: Mapping[str, int]
    target: Mapping[str, int]
    differences: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None

    def compared(self, source: Mapping[str, int], result: Mapping[str, int]) -> list[Compared]:
        """The sizes side by side.

        Args:
            source: the sizes of the source, by role.
            result: the sizes of the grown model, by role.
        """
        if self.layers is not None:
            source, result = {**source, "layers": self.layers[0]}, {**result, "layers": self.layers[1]}
        rows = [Compared(role, source.get(role), self.target.get(role), result.get(role)) for role in COMPARED]
        return [row for row in rows if row.source is not None or row.target is not None]


def read_target(path: str | os.PathLike[str]) -> Target:
    """Read a target: a folder with a config.json, such a file, or an ONNX file.

    Raises:
        BadModel: it cannot be read, or has no sizes.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
        if not file.is_file():
            raise BadModel(f"{path}: no config.json in this folder; name a Hugging Face folder, or an ONNX file")
    return _read_config(file) if file.suffix == ".json" else _read_onnx(file)


def like(analysis: Analysis, target: Target) -> Likeness:
    """The sizes that make a model as large as a target, and what stays different.

    Raises:
        BadRequest: the target has a size that the source cannot be compared with.
        Refused: the target is a model of another family.
    """
    known = quantities(analysis.dimensions, analysis.named)
    config = _config_beside(analysis.path)
    own = sizes_by_role(known)
    if config is not None:
        _check_family(target, config)
    wanted = {role: size for role, size in target.sizes.items() if role in SIZE_ROLES}
    roles = {quantity.role for quantity in known}
    if target.operators is not None:
        _check_roles(target, roles)
    sizes: dict[str, int] = {}
    differences: list[str] = []
    for role, size in wanted.items():
        if role == "kv_heads" and role not in roles:
            differences += _without_groups(size, wanted.get("heads"))
        elif role not in roles:
            differences.append(f"{role} {size}: the source has no dimension of this role")
        elif role in own or config is None or role not in config.sizes:
            sizes[role] = size
        else:
            matching = [quantity for quantity in known if quantity.role == role and quantity.size == config.sizes[role]]
            sizes |= {quantity.name: size for quantity in matching}
            others = sorted({q.size for q in known if q.role == role} - {config.sizes[role]})
            differences.append(f"other dimensions of the role {role} ({_listed(others)}) keep their sizes")
    layers = layers_of(analysis.model)
    if target.sizes.get("layers", layers) != layers:
        differences.append(f"layers: {target.sizes['layers']} in the target; the result has {layers or 'its own'}")
    differences += _differences(analysis, target, config)
    return Likeness(
        str(target.path), sizes, target.sizes, tuple(differences), None if layers is None else (layers, layers)
    )


def sizes_by_role(known: Iterable[Quantity]) -> dict[str, int]:
    """The size of each role that has one size throughout a model."""
    by_role: dict[str, set[int]] = {}
    for quantity in known:
        by_role.setdefault(quantity.role, set()).add(quantity.size)
    return {role: next(iter(sizes)) for role, sizes in by_role.items() if len(sizes) == 1}


def _without_groups(kv_heads: int, heads: int | None) -> list[str]:
    """What a number of key/value heads means for a source whose heads are not in groups.

    Raises:
        Refused: the target has groups.
    """
    if kv_heads in (1, heads):
        return []
    raise Refused(
        f"the target has {heads} query heads and {kv_heads} key/value heads, and the heads of the source are not in "
        "groups: key/value heads cannot be merged. Choose a target with as many key/value heads as query heads"
    )


# -- configurations -------------------------------------------------------------------------------------------


def _read_config(file: Path) -> Target:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise BadModel(f"{file}: cannot be read ({problem.strerror or problem})") from problem
    except (ValueError, RecursionError) as problem:
        raise BadModel(f"{file}: not a JSON file ({printable(str(problem))})") from problem
    if not isinstance(data, dict):
        raise BadModel(f"{file}: no configuration of a model: it is not an object of JSON")
    inner = data.get("text_config")
    settings = {**data, **inner} if isinstance(inner, dict) else data
    sizes = {role: size for role, names in FIELDS.items() if (size := _size(file, settings, names)) is not None}
    if "hidden" not in sizes:
        raise BadModel(f"{file}: no size of a model: none of the fields {', '.join(FIELDS['hidden'])}")
    if settings.get("multi_query") is True and not settings.get("new_decoder_architecture"):
        sizes["kv_heads"] = 1
    if "heads" in sizes:
        sizes.setdefault("kv_heads", sizes["heads"])
        if sizes["hidden"] % sizes["heads"] == 0:
            sizes.setdefault("head_dim", sizes["hidden"] // sizes["heads"])
    named = {name for names in FIELDS.values() for name in names}
    others = {name: value for name, value in settings.items() if name not in named and name != "text_config"}
    return Target(file, sizes, others)


def _size(file: Path, settings: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The size that the fields of a configuration give.

    Raises:
        BadModel: a field is no size.
        BadRequest: two of them differ, such as those of an encoder and a decoder.
    """
    given: dict[str, int] = {}
    for name in names:
        value = settings.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            if isinstance(value, list):  # one number for each layer, or for each stage
                raise BadRequest(f"{file}: {name} is a list: give the sizes with --size")
            raise BadModel(f"{file}: {name} is {json.dumps(value)[:80]}, and no size")
        given[name] = value
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in given.items())
        raise BadRequest(f"{file}: {listed} differ: give the sizes with --size")
    return next(iter(given.values()), None)


def _config_beside(model: Path) -> Target | None:
    """The configuration of the source, where its file lies in a Hugging Face folder; else None."""
    for folder in (model.parent, model.parent.parent):
        if (folder / "config.json").is_file():
            try:
                return _read_config(folder / "config.json")
            except (BadModel, BadRequest):
                return None
    return None


def _check_family(target: Target, own: Target) -> None:
    theirs, ours = target.settings.get("model_type"), own.settings.get("model_type")
    if theirs is not None and ours is not None and theirs != ours:
        raise Refused(
            f"{target.path} is a model of the type {theirs!r}, and {own.path} says that the source is {ours!r}: "
            "give the sizes themselves, with --size"
        )


def layers_like(model: ir.Model, target: Target) -> int | None:
    """The number of layers that makes a model as deep as a target; None if it is, or if one of the two is not known.

    Raises:
        BadRequest: the target has fewer layers.
    """
    own, wanted = layers_of(model), target.sizes.get("layers")
    if own is None or wanted is None or own == wanted:
        return None
    if wanted < own:
        raise BadRequest(f"layers={wanted} is below the source's {own}: layers are only added, shrink takes them away")
    return wanted


def layers_of(model: ir.Model) -> int | None:
    """The number of layers of a model; None where it has not exactly one stack of layers."""
    graph = model.clone().graph
    unfuse(graph)
    stacks = find_stacks(graph)
    return stacks[0].layers if len(stacks) == 1 else None


def _check_roles(target: Target, roles: set[str]) -> None:
    """Check that an ONNX file has dimensions of the same roles as the source.

    Raises:
        Refused: it has not.
    """
    compared = {"hidden", "ffn", "heads", "group", "head_dim"}
    more, fewer = compared & (target.sizes.keys() - roles), compared & (roles - target.sizes.keys())
    if more or fewer:
        texts = [f"has {', '.join(sorted(more))}, which the source has not"] if more else []
        texts += [f"has no {', '.join(sorted(fewer))}, which the source has"] if fewer else []
        raise Refused(f"{target.path} is a model of another family: it {' and '.join(texts)}. Give sizes with --size")


def _differences(analysis: Analysis, target: Target, own: Target | None) -> list[str]:
    """What the target has, apart from sizes, and the source has not."""
    texts: list[str] = []
    if "vocab" in target.sizes:
        tables = sorted({named.size for named in analysis.named if named.role == "vocab"})
        if target.sizes["vocab"] not in tables:
            texts.append(f"vocabulary: {target.sizes['vocab']} in the target; it keeps its size ({_listed(tables)})")
    if target.operators is not None:
        mine = operators(analysis)
        for words, more in (
            ("the target has", target.operators - mine),
            ("only the source has", mine - target.operators),
        ):
            if more:
                texts.append(f"operators that {words}: {', '.join(sorted(more))}")
    elif own is None:
        said = [f"{name} {_short(target.settings[name])}" for name in SHOWN_SETTINGS if name in target.settings]
        if said:
            texts.append(f"not compared, because there is no config.json beside the source: {', '.join(said)}")
    else:
        fields = sorted((target.settings.keys() | own.settings.keys()) - set(IGNORED_SETTINGS))
        for name in fields:
            theirs, ours = (_short(settings.get(name)) for settings in (target.settings, own.settings))
            if theirs != ours:
                texts.append(f"{name}: {theirs} in the target, {ours} in the source, which stays")
    return texts


SHOWN_SETTINGS = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "tie_word_embeddings",
    "rope_theta",
)
"""What is said of a target where the source has no configuration to compare with."""


def _short(value: Any) -> str:
    text = printable(json.dumps(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


# -- ONNX files -------------------------------------------------------------------------------------------------


def _read_onnx(file: Path) -> Target:
    analysis = analyse(file)
    known = quantities(analysis.dimensions, analysis.named)
    sizes = sizes_by_role(known)
    several = sorted({quantity.role for quantity in known} - sizes.keys())
    if several:
        raise BadRequest(
            f"{file}: {', '.join(several)} has several sizes there, so that they cannot be matched: "
            "give the sizes with --size"
        )
    tables = {named.size for named in analysis.named if named.role == "vocab"}
    if len(tables) == 1:
        sizes["vocab"] = tables.pop()
    layers = layers_of(analysis.model)
    if layers is not None:
        sizes["layers"] = layers
    return Target(file, sizes, operators=operators(analysis))


def operators(analysis: Analysis) -> frozenset[str]:
    """The operators of a graph that compute with weights or change values; not those that move elements or shapes."""
    return frozenset(node.op_type for node in analysis.model.graph if node.op_type in FAMILY_OPERATORS)


FAMILY_OPERATORS = frozenset(
    "Relu Gelu FastGelu BiasGelu QuickGelu Erf Sigmoid Tanh Swish Mish Elu LeakyRelu HardSwish Softplus Selu Celu "
    "PRelu LayerNormalization SkipLayerNormalization RMSNormalization SimplifiedLayerNormalization "
    "SkipSimplifiedLayerNormalization GroupNormalization InstanceNormalization BatchNormalization Conv ConvTranspose "
    "LSTM GRU RNN MoE QMoE TopK RotaryEmbedding Cos Sin".split()
)
"""Operators that tell families apart: activations, norms, experts, positions."""
