"""Reads and writes recipe files: YAML that says all that the options of `expand` can say, and strategies for tensors.

A file is checked against `KEYS` before anything else happens. Every error names the line.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperclone_onnx.errors import BadModel, BadRequest, first_line, printable
from hyperclone_onnx.plan.strategies import HIGHEST_SNR_DB, LOWEST_SNR_DB, OFFERED, StrategyRule

LONGEST_FILE = 10**6
"""A longer file is no recipe (bytes)."""

_LINE_SEPARATORS = "\x85\u2028\u2029"


@dataclass(frozen=True)
class Kind:
    """A kind of value: what it is called in messages, and how it is checked."""

    text: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _choice(*values: str) -> Kind:
    return Kind(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _whole(least: int) -> Kind:
    return Kind(f"a whole number from {least} on", lambda value: _is_whole(value) and value >= least)


def _are_places(value: Any) -> bool:
    return value in ("even", "end") or _are_numbers(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_whole(number) and number >= 0 for number in value)


LAYERS = Kind(
    "a number of layers, or one for each stack, such as {encoder: 8, decoder: 12}",
    lambda value: _is_whole(value) and value >= 1,
)
EXPERTS_IN = Kind(
    "all, a number such as 2 for every second block, or a list of blocks such as [1, 3]",
    lambda value: value == "all" or (_is_whole(value) and value >= 1) or _are_numbers(value),
)
LAYERS_AT = Kind("even, end or a list of layers such as [3, 7]", _are_places)
FACTOR = Kind("a number from 1 on, such as 2 or 1.5", lambda value: _is_number(value) and value >= 1)
SNR_DB = Kind(
    f"a number from {LOWEST_SNR_DB:g} to {HIGHEST_SNR_DB:g}",
    lambda value: _is_number(value) and LOWEST_SNR_DB <= value <= HIGHEST_SNR_DB,
)
LEVEL = Kind("a number from 0 on, such as 0.1", lambda value: _is_number(value) and value >= 0)
RATIO = Kind("a number from 0 to 1, such as 0.5", lambda value: _is_number(value) and 0 <= value <= 1)
GIGABYTES = Kind("a number above 0", lambda value: _is_number(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str) and bool(value))
COUNTS = Kind("names with whole numbers, such as {ffn: 2}", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of texts", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value))
RULES = Kind("a list of rules, such as {role: ffn, strategy: symmetric}", lambda value: isinstance(value, list))

GROWTH_KEYS: Mapping[str, Kind] = {
    "factor": FACTOR,
    "set": COUNTS,
    "size": COUNTS,
    "like": TEXT,
    "layers": LAYERS,
    "depth": _choice("identity", "stack", "interpose"),
    "layers_at": LAYERS_AT,
    "experts": _whole(1),
    "top_k": _whole(1),
    "experts_in": EXPERTS_IN,
    "granularity": _whole(1),
    "shared_expert": FLAG,
    "expert_noise": LEVEL,
    "drop_upcycle": RATIO,
    "moe_operator": _choice("standard", "microsoft"),
    "more_experts": _whole(1),
    "strategy": _choice(*OFFERED),
    "snr_db": SNR_DB,
    "seed": _whole(0),
    "strategies": RULES,
    "allow_change": FLAG,
    "untie": FLAG,
    "separate": FLAG,
    "interface": _choice("grow", "keep"),
}
"""What decides the grown model. The plan records these."""

KEYS: Mapping[str, Kind] = {
    **GROWTH_KEYS,
    "device": _choice("auto", "cpu", "cuda"),
    "validate": _choice("full", "algebraic", "none"),
    "inputs": TEXT,
    "dim": COUNTS,
    "precision": _choice("stored", "float64"),
    "max_shard_size": GIGABYTES,
    "workers": _whole(1),
    "exclude": TEXTS,
}
"""Every key of a recipe. A key is called as the option of `expand` is, with _ for -."""

RULE_KEYS: Mapping[str, Kind] = {
    "role": TEXT,
    "dimension": TEXT,
    "tensor": TEXT,
    "strategy": _choice(*OFFERED),
    "snr_db": SNR_DB,
    "seed": _whole(0),
}
"""Every key of a rule in `strategies`."""

PATHS = ("like", "inputs")
"""The keys whose values are paths. A relative path starts at the folder of the recipe."""

LINE = "line"
"""The key under which a rule keeps the line that it begins at. No recipe has this key."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe file.

    Returns:
        The values by key. Each rule of "strategies" also has its line, under `LINE`.

    Raises:
        BadModel: the file cannot be read.
        BadRequest: it is no YAML, has an unknown key, or a value of the wrong kind. The text names the line.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        data = path.read_bytes()
        text = data.decode("utf-8") if len(data) <= LONGEST_FILE else None
    except (OSError, UnicodeDecodeError) as problem:
        raise BadModel(
            f"{path}: cannot be read ({getattr(problem, 'strerror', None) or first_line(problem)})"
        ) from problem
    if text is None:
        raise BadRequest(f"{path}: {len(data):,} bytes are too many for a recipe")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return {} if node is None else _Reader(path, loader).recipe(node)
    except yaml.MarkedYAMLError as problem:
        line = f", line {problem.problem_mark.line + 1}" if problem.problem_mark is not None else ""
        raise BadRequest(f"{path}{line}: not YAML: {printable(problem.problem or 'it cannot be read')}") from problem
    except yaml.YAMLError as problem:
        raise BadRequest(f"{path}: not YAML: {printable(first_line(problem))}") from problem
    except (RecursionError, ValueError) as problem:
        raise BadRequest(f"{path}: not a recipe: {printable(first_line(problem))}") from problem


@dataclass(frozen=True)
class _Reader:
    """Reads the nodes of one file."""

    path: Path
    loader: Any

    def recipe(self, node: Any) -> dict[str, Any]:
        """The whole file."""
        recipe: dict[str, Any] = {}
        for key, value_node in self.entries(node, KEYS, "a recipe"):
            if KEYS[key] is RULES:
                recipe[key] = [self.rule(rule) for rule in self.items(key, value_node)]
            else:
                value = self.value(key, value_node, KEYS[key])
                recipe[key] = self.beside(value) if key in PATHS else value
        return recipe

    def rule(self, node: Any) -> dict[str, Any]:
        """One rule of "strategies"."""
        rule = {
            key: self.value(key, value, RULE_KEYS[key]) for key, value in self.entries(node, RULE_KEYS, "a strategy")
        }
        subjects = rule.keys() & {"role", "dimension", "tensor"}
        if len(subjects) != 1:
            raise self.error(node, "a strategy is for a role, a dimension or a tensor: give exactly one of the three")
        if len(rule) == 1:
            raise self.error(node, "this strategy changes nothing: give strategy, snr_db or seed")
        return {**rule, LINE: node.start_mark.line + 1}

    def entries(self, node: Any, known: Mapping[str, Kind], what: str) -> Iterator[tuple[str, Any]]:
        """The keys of a mapping, all of which are known, with the nodes of their values."""
        if node.id != "mapping":
            raise self.error(node, f"{what} has keys with values, such as strategy: symmetric")
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = str(key_node.value) if key_node.id == "scalar" else ""
            if key not in known:
                matches = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {matches[0]!r}?" if matches else f"it is one of {', '.join(known)}"
                raise self.error(key_node, f"{what} has no key {printable(repr(key))}; {hint}")
            if key in seen:
                raise self.error(key_node, f"{key} is there twice")
            seen.add(key)
            yield key, value_node

    def items(self, key: str, node: Any) -> list[Any]:
        """The nodes of a list."""
        if node.id != "sequence":
            raise self.error(node, f"{key}: {RULES.text}")
        return list(node.value)

    def value(self, key: str, node: Any, kind: Kind) -> Any:
        """A value that is of its kind."""
        if kind in (COUNTS, LAYERS) and node.id == "mapping":
            return self.counts(key, node)
        value = self.plain(node)
        if not kind.accepts(value):
            raise self.error(node, f"{key} is {kind.text}, not {printable(repr(value))[:60]}")
        return value

    def counts(self, key: str, node: Any) -> dict[str, int]:
        """Whole numbers by name."""
        counts: dict[str, int] = {}
        for name_node, value_node in node.value:
            name, value = self.plain(name_node), self.plain(value_node)
            if not isinstance(name, str) or not _is_whole(value) or value < 1:
                raise self.error(name_node, f"{key} has {COUNTS.text}, not {printable(f'{name}: {value}')[:60]}")
            if name in counts:
                raise self.error(name_node, f"{key}: {printable(name)} is there twice")
            counts[name] = value
        return counts

    def plain(self, node: Any) -> Any:
        """A scalar, or a list of scalars. Anything else is of no kind."""
        if node.id == "scalar":
            return self.loader.construct_object(node)
        if node.id == "sequence":
            return [self.loader.construct_object(item) if item.id == "scalar" else None for item in node.value]
        return None

    def beside(self, value: str) -> Path:
        """A path that may start at the folder of the recipe."""
        return self.path.parent / value

    def error(self, node: Any, text: str) -> BadRequest:
        """The error for a node."""
        return BadRequest(f"{self.path}, line {node.start_mark.line + 1}: {text}")


def strategy_rules(path: Path | None, recipe: Mapping[str, Any]) -> tuple[StrategyRule, ...]:
    """The rules of a recipe that was read from a file."""
    return tuple(
        StrategyRule(
            rule.get("role"),
            rule.get("dimension"),
            rule.get("tensor"),
            rule.get("strategy"),
            None if rule.get("snr_db") is None else float(rule["snr_db"]),
            rule.get("seed"),
            f"{path}, line {rule[LINE]}",
        )
        for rule in recipe.get("strategies", ())
    )


def written_recipe(recipe: Mapping[str, Any], folder: Path) -> str:
    """The text of a recipe file.

    Args:
        recipe: the values by key.
        folder: the folder of the file. Paths are written relative to it.
    """
    import yaml

    data = plain_recipe(recipe, folder)
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    if any(separator in text for separator in _LINE_SEPARATORS):  # YAML reads these as spaces unless they are escaped
        text = yaml.safe_dump(data, sort_keys=False)
    return f"# hyperclone-onnx expand MODEL --recipe THIS_FILE -o OUT\n{text}"


def plain_recipe(recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe as plain data, in the order of `KEYS`."""
    plain: dict[str, Any] = {}
    for key in KEYS:
        value = recipe.get(key)
        if value is None:
            continue
        if key in PATHS:
            value = Path(os.path.relpath(value, folder)).as_posix()
        elif key == "strategies":
            value = [{name: part for name, part in rule.items() if name != LINE} for rule in value]
        elif key == "exclude":
            value = list(value)
        elif isinstance(value, Mapping):
            value = dict(value)
        plain[key] = value
    return plain
