"""Which matrix is stored how: the defaults are mlx-lm's, so that both programs write the same tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from lfm_mlx.config import BITS, GROUP_SIZES, Quantization
from lfm_mlx.errors import ConfigError, OptionError
from lfm_mlx.names import Shape, is_matrix, is_router
from lfm_mlx.types import check_integer

_DEFAULT_GROUP_SIZES = {"affine": 64, "mxfp4": 32, "nvfp4": 16, "mxfp8": 32}
_DEFAULT_BITS = {"affine": 4, "mxfp4": 4, "nvfp4": 4, "mxfp8": 8}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Says for every tensor how it is stored.

    Args:
        name: what the recipe is called in messages.
        default: how matrices are stored; None leaves everything unquantised.
    """

    name: str
    default: Quantization | None

    def of(self, name: str, shape: Shape) -> Quantization | None:
        """How our tensor `name` of `shape` is stored; None means unquantised.

        A matrix whose rows do not divide into groups stays unquantised. Routers choose the experts and are tiny, so
        they keep 8 bits whatever the rest has.
        """
        if self.default is None or not is_matrix(name) or shape[-1] % self.default.group_size:
            return None
        return _router_quantization(shape[-1]) if is_router(name) else self.default


def _router_quantization(width: int) -> Quantization | None:
    fitting = (size for size in (64, 32) if width % size == 0)
    group_size = next(fitting, None)
    return None if group_size is None else Quantization(group_size=group_size, bits=8)


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
    return Recipe(name=f"{bits}bit" if mode == "affine" else mode, default=default)


def _check_choice(name: str, value: int, allowed: tuple[int, ...], mode: str) -> None:
    check_integer(name, value)
    if value not in allowed:
        listed = " or ".join(map(str, allowed)) if len(allowed) < 3 else ", ".join(map(str, allowed))
        raise OptionError(f"{name} is {value}, expected {listed} in mode {mode}")


UNQUANTIZED = Recipe(name="unquantized", default=None)

RECIPES: Mapping[str, Recipe] = {
    **{f"{bits}bit": uniform_recipe(bits=bits) for bits in BITS["affine"]},
    **{mode: uniform_recipe(mode=mode) for mode in BITS if mode != "affine"},
    UNQUANTIZED.name: UNQUANTIZED,
}
"""Recipes that can be asked for by name."""


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        OptionError: there is none of that name.
    """
    if name in RECIPES:
        return RECIPES[name]
    raise OptionError(f"recipe is {name!r}, expected one of {', '.join(RECIPES)}{_nearest(name, RECIPES)}")


def _nearest(name: object, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (nearest: {close[0]})" if close else ""
