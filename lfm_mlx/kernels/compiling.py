"""Whether and how functions are compiled through `mx.compile`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx

from lfm_mlx.errors import OptionError

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILE_VARIABLE = "LFM_MLX_COMPILE"


def is_compiling() -> bool:
    """Whether functions are compiled: on GPUs, unless the environment variable LFM_MLX_COMPILE says "on" or "off".

    On the CPU it is off by itself: there `mx.compile` calls g++, which takes a second a function and may be absent.

    Raises:
        OptionError: the variable holds something else.
    """
    wish = os.environ.get(COMPILE_VARIABLE, "auto")
    if wish not in ("auto", "on", "off"):
        raise OptionError(f"{COMPILE_VARIABLE} is {wish!r}, expected auto, on or off")
    return wish == "on" or (wish == "auto" and mx.default_device().type != mx.cpu)


def fused(function: Function) -> Function:
    """A decorator: elementwise `function` of arrays runs as one kernel, whatever their shapes, where `is_compiling`.

    Slices and splits are the caller's: MLX compiles for every shape at once only what has none of them.
    """
    compiled = mx.compile(function, shapeless=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (compiled if is_compiling() else function)(*arguments)

    return call  # type: ignore[return-value]
