"""Options of `expand` that a recipe file gives, and the recipe file that a command line means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

PARAMETERS: Mapping[str, str] = {
    "factor": "factor",
    "set": "requests",
    "size": "sizes",
    "like": "like",
    "layers": "layers",
    "depth": "depth",
    "layers_at": "layers_at",
    "experts": "experts",
    "top_k": "top_k",
    "experts_in": "experts_in",
    "granularity": "granularity",
    "shared_expert": "shared_expert",
    "expert_noise": "expert_noise",
    "drop_upcycle": "drop_upcycle",
    "moe_operator": "moe_operator",
    "more_experts": "more_experts",
    "strategy": "strategy",
    "snr_db": "snr_db",
    "seed": "seed",
    "allow_change": "allow_change",
    "untie": "untie",
    "separate": "separate",
    "interface": "interface",
    "device": "device",
    "validate": "validation",
    "inputs": "inputs",
    "dim": "dims",
    "precision": "precision",
    "max_shard_size": "max_shard_size",
    "workers": "workers",
    "exclude": "exclude",
}
"""The parameter of the command for each key of a recipe. What a recipe says besides is no option."""

NEGATED = {"validation": "no_validate"}
"""A parameter that stands for a value of another one."""


@dataclass(frozen=True)
class Request:
    """The options of one run, and the recipe that means the same."""

    options: Mapping[str, Any]
    """All parameters of the command, with those that the recipe file gives."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The values by key of a recipe."""
    file: Path | None = None
    """The recipe file that was read."""

    def growth_recipe(self) -> dict[str, Any]:
        """The part of the recipe that decides the grown model, as plain data. The plan records it."""
        from hyperclone_onnx.planning.recipe_file import GROWTH_KEYS, plain_recipe

        folder = Path() if self.file is None else self.file.parent
        return {key: value for key, value in plain_recipe(self.recipe, folder).items() if key in GROWTH_KEYS}


def with_recipe(context: click.Context, options: Mapping[str, Any], file: Path | None) -> Request:
    """The options, completed by those of a recipe file. Options on the command line replace those of the file.

    Roles and dimensions of --set, --size and --dim are replaced one by one.

    Raises:
        BadModel, BadRequest: see `planning.recipe_file.read_recipe`.
    """
    recipe: dict[str, Any] = {}
    if file is not None:
        from hyperclone_onnx.planning.recipe_file import read_recipe

        recipe = read_recipe(file)
    merged = dict(options)
    for key, parameter in PARAMETERS.items():
        given = context.get_parameter_source(parameter) is ParameterSource.COMMANDLINE
        negated = parameter in NEGATED and options[NEGATED[parameter]]
        if given or negated:
            value: Any = options[parameter] if given else "none"
            if isinstance(value, dict) and isinstance(recipe.get(key), dict):
                value = {**recipe[key], **value}
            merged[parameter] = value
            recipe[key] = value / 1e9 if key == "max_shard_size" else value
        elif key in recipe:
            merged[parameter] = _parameter(key, recipe[key])
    return Request(merged, recipe, file)


def _parameter(key: str, value: Any) -> Any:
    """The value of a recipe as the command line gives it."""
    if key == "max_shard_size":
        return max(1, int(value * 1e9))
    if key == "factor":
        return int(value) if float(value).is_integer() else float(value)
    if key == "snr_db":
        return float(value)
    return tuple(value) if key == "exclude" else value
