"""Which matrix is stored how: the defaults are mlx-lm's, so that both programs write the same tensors."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lfm_mlx.config import BITS, GROUP_SIZES, Quantization
from lfm_mlx.errors import ConfigError, OptionError
from lfm_mlx.names import Shape, is_matrix, is_router, layer_of
from lfm_mlx.types import check_integer

_DEFAULT_GROUP_SIZES = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}
_DEFAULT_BITS = {"affine": 4, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}


LARGE_CONFIG: Mapping[str, Any] = {
    "model_type": "lfm2_moe",
    "vocab_size": 128000,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_dense_layers": 2,
    "full_attn_idxs": [2, 6, 10, 14, 18, 21],
}
"""The geometry of LFM2.5-8B-A1B, to tell sizes without a checkpoint."""

ROUNDINGS = ("minmax", "search")
"""How scale and bias of an affine group are found: from its extremes, as mlx-lm does, or by a search."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An exception from a recipe's default.

    Args:
        match: patterns of module paths, with ``*`` for anything.
        how: how a matrix that matches is stored; None leaves it unquantised.
        layers: the layers it is about, negative ones counted from the end; None means all, and what is in no layer.
    """

    match: tuple[str, ...]
    how: Quantization | None
    layers: tuple[int, ...] | None = None

    def is_about(self, path: str, num_layers: int) -> bool:
        """Whether the module at `path` of a model with so many layers is meant."""
        if not _matches(self, path):
            return False
        if self.layers is None:
            return True
        return layer_of(path) in {layer % num_layers for layer in self.layers if -num_layers <= layer < num_layers}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Says for every tensor how it is stored.

    Args:
        name: what the recipe is called in messages.
        default: how matrices are stored; None leaves everything unquantised.
        rules: exceptions; the first that matches decides.
        rounding: one of `ROUNDINGS`.
        description: what it is good for, in a line.

    Raises:
        OptionError: a rule puts the router under 8 bits.
    """

    name: str
    default: Quantization | None
    rules: tuple[Rule, ...] = ()
    rounding: str = "minmax"
    description: str = ""

    def __post_init__(self) -> None:
        for rule in self.rules:
            meant = [_matches(rule, _ROUTER.format(layer)) for layer in range(_MANY_LAYERS)]
            if any(meant) and rule.how is not None and rule.how.bits < _ROUTER_BITS:
                raise OptionError(
                    f"recipe {self.name}: the rule for {', '.join(rule.match)} puts the router (*.feed_forward.gate) "
                    f"into {rule.how.bits} bits, expected at least {_ROUTER_BITS}: it chooses the experts and is tiny; "
                    'put a rule {"match": "*.feed_forward.gate", "bits": 8} before it'
                )
            if all(meant) and rule.layers is None:
                return  # no router gets past this rule

    @property
    def searches(self) -> bool:
        """Whether scales are searched for."""
        return self.rounding == "search"

    def of(self, name: str, shape: Shape, num_layers: int = 1) -> Quantization | None:
        """How our tensor `name` of `shape` in a model of so many layers is stored; None means unquantised.

        A matrix whose rows do not divide into groups stays unquantised. Routers choose the experts and are tiny, so
        they keep 8 bits whatever the rest has.
        """
        if self.default is None or not is_matrix(name):
            return None
        path = name.removesuffix(".weight")
        for rule in self.rules:
            if rule.is_about(path, num_layers):
                return None if rule.how is None else _fitting(rule.how, shape[-1])
        if is_router(name):
            fits_default = shape[-1] % self.default.group_size == 0
            return _fitting(Quantization(group_size=64, bits=_ROUTER_BITS), shape[-1]) if fits_default else None
        return None if shape[-1] % self.default.group_size else self.default

    def as_json(self) -> dict[str, Any]:
        """The recipe as a recipe file holds it."""
        rules = [
            {"match": list(rule.match)}
            | ({} if rule.layers is None else {"layers": list(rule.layers)})
            | ({"bits": 16} if rule.how is None else asdict(rule.how))
            for rule in self.rules
        ]
        default = {"bits": 16} if self.default is None else asdict(self.default)
        return {"name": self.name, "default": default, "rounding": self.rounding, "rules": rules}


_ROUTER = "model.layers.{}.feed_forward.gate"
_ROUTER_BITS = 8
_MANY_LAYERS = 100
"""More than any model has: which layers have routers is not known to a recipe."""


def _matches(rule: Rule, path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in rule.match)


def _fitting(how: Quantization, width: int) -> Quantization | None:
    """`how` with the largest group that divides `width`, none larger than its own; None if there is none."""
    sizes = sorted((size for size in GROUP_SIZES[how.mode] if size <= how.group_size), reverse=True)
    size = next((size for size in sizes if width % size == 0), None)
    return None if size is None else replace(how, group_size=size)


def uniform_recipe(*, bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Recipe:
    """A recipe that stores every matrix alike (routers excepted).

    Args:
        bits: bits per value; None takes the mode's own (affine: 4).
        group_size: values that share a scale; None takes the mode's own (affine: 64).
        mode: affine, mxfp4, nvfp4 or mxfp8.

    Raises:
        OptionError: a value that MLX does not offer in this mode.
    """
    if mode not in BITS:
        raise OptionError(f"mode is {mode!r}, expected one of {', '.join(BITS)}{_nearest(mode, BITS)}")
    bits = _DEFAULT_BITS[mode] if bits is None else bits
    group_size = _DEFAULT_GROUP_SIZES[mode] if group_size is None else group_size
    _check_choice("bits", bits, BITS[mode], mode)
    _check_choice("group_size", group_size, GROUP_SIZES[mode], mode)
    try:
        default = Quantization(group_size=group_size, bits=bits, mode=mode)
    except ConfigError as error:
        raise OptionError(str(error)) from error
    values = f"{bits} bits in groups of {group_size}" if mode == "affine" else f"{mode}, groups of {group_size}"
    description = f"every matrix in {values}, routers in {_ROUTER_BITS} bits: mlx-lm's layout"
    return Recipe(name=f"{bits}bit" if mode == "affine" else mode, default=default, description=description)


def _check_choice(name: str, value: int, allowed: tuple[int, ...], mode: str) -> None:
    check_integer(name, value)
    if value not in allowed:
        listed = " or ".join(map(str, allowed)) if len(allowed) < 3 else ", ".join(map(str, allowed))
        raise OptionError(f"{name} is {value}, expected {listed} in mode {mode}")


def read_recipe(file: Path) -> Recipe:
    """The recipe in a JSON file of the user's.

    Raises:
        OptionError: the file cannot be read, or holds something that is no recipe; the message names the key.
    """
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"recipe {file}: cannot be read as JSON ({error})") from error
    return parse_recipe(raw, file.stem)


def parse_recipe(raw: object, name: str) -> Recipe:
    """A recipe from JSON.

    Args:
        raw: ``{"default": {"bits": 4, "group_size": 64, "mode": "affine"}, "rounding": "search", "rules": [{"match":
            "*.self_attn.*", "layers": [0, -1], "bits": 8}]}``. Everything but ``bits`` may be left out; 16 bits mean
            unquantised.
        name: what it is called where it does not say.

    Raises:
        OptionError: a key is unknown or a value refused.
    """
    fields = _known_keys(raw, ("name", "description", "default", "rounding", "rules"), f"recipe {name}")
    rounding = fields.get("rounding", "minmax")
    if rounding not in ROUNDINGS:
        raise OptionError(f"recipe {name}: rounding is {rounding!r}, expected one of {', '.join(ROUNDINGS)}")
    rules = fields.get("rules", [])
    if not isinstance(rules, list):
        raise OptionError(f"recipe {name}: rules is {rules!r:.80}, expected a list")
    return Recipe(
        name=str(fields.get("name", name)),
        description=str(fields.get("description", "")),
        default=_parse_how(fields.get("default", {"bits": 4}), f"recipe {name}: default"),
        rounding=str(rounding),
        rules=tuple(_parse_rule(rule, f"recipe {name}: rules[{i}]") for i, rule in enumerate(rules)),
    )


def _parse_rule(raw: object, where: str) -> Rule:
    fields = _known_keys(raw, ("match", "layers", "bits", "group_size", "mode"), where)
    match, layers = fields.pop("match", None), fields.pop("layers", None)
    patterns = [match] if isinstance(match, str) else match
    if not isinstance(patterns, list) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(f"{where}: match is {match!r:.80}, expected a pattern such as '*.self_attn.*', or several")
    if layers is not None and (not isinstance(layers, list) or not all(type(layer) is int for layer in layers)):
        raise OptionError(f"{where}: layers is {layers!r:.80}, expected a list of layers such as [0, 1, -1]")
    how = _parse_how(fields, where)
    return Rule(match=tuple(patterns), how=how, layers=None if layers is None else tuple(layers))


def _parse_how(raw: object, where: str) -> Quantization | None:
    fields = _known_keys(raw, ("bits", "group_size", "mode"), where)
    if fields.get("bits") == 16:
        return None
    try:
        return uniform_recipe(**({"mode": "affine"} | fields)).default
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _known_keys(raw: object, known: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise OptionError(f"{where} is {raw!r:.80}, expected an object with {', '.join(known)}")
    for key in raw:
        if key not in known:
            raise OptionError(f"{where}: {key!r} is not known, expected {', '.join(known)}{_nearest(key, known)}")
    return dict(raw)


def _shipped() -> dict[str, Recipe]:
    raw = json.loads(Path(__file__).with_name("known_recipes.json").read_text(encoding="utf-8"))
    return {name: parse_recipe(fields, name) for name, fields in raw.items()}


UNQUANTIZED = Recipe(name="unquantized", default=None, description="full precision; only names and layout change")

RECIPES: Mapping[str, Recipe] = {
    **{f"{bits}bit": uniform_recipe(bits=bits) for bits in BITS["affine"]},
    **{mode: uniform_recipe(mode=mode) for mode in BITS if mode != "affine"},
    **_shipped(),
    UNQUANTIZED.name: UNQUANTIZED,
}
"""Recipes that can be asked for by name."""


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`, or the one in the JSON file of that path.

    Raises:
        OptionError: there is none of that name, or the file holds no recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    if name.endswith(".json"):
        return read_recipe(Path(name).expanduser())
    raise OptionError(
        f"recipe is {name!r}, expected one of {', '.join(RECIPES)}{_nearest(name, RECIPES)}, or a .json file"
    )


def _nearest(name: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (nearest: {close[0]})" if close else ""
