"""Which fused kernels run: where there is Metal, in the shapes they are for, unless switched off or found wanting."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from lfm_mlx.errors import OptionError
from lfm_mlx.kernels.verdict import Verdict, verdict_of

KERNELS_VARIABLE = "LFM_MLX_KERNELS"

KERNEL_NAMES = ("add_norm", "combine_norm", "expert_router", "qk_norm_rope")
"""Every fused kernel."""

MAX_TOKENS = 256
"""Most tokens of a call, all rows together, for which the kernels are meant; prompts are the stock operations'."""

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the environment asks for.

    Args:
        names: kernels that may run.
        is_forced: whether they run even where they are slower than the stock operations.
    """

    names: frozenset[str]
    is_forced: bool


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a kernel's verdict holds for: a dtype and the sizes that its code depends on."""

    dtype: mx.Dtype
    sizes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, dtype: mx.Dtype, **sizes: int) -> Case:
        """A case of these sizes."""
        return cls(dtype=dtype, sizes=tuple(sizes.items()))

    def __getitem__(self, name: str) -> int:
        """The size of that name."""
        return dict(self.sizes)[name]

    def __str__(self) -> str:
        return " ".join([str(self.dtype).removeprefix("mlx.core."), *(f"{name}={size}" for name, size in self.sizes)])


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedKernel:
    """A kernel beside the stock operations that it replaces; a call runs one or the other.

    Args:
        name: one of `KERNEL_NAMES`.
        source: the Metal source; a verdict holds for one source.
        launch: runs the kernel.
        reference: runs stock operations on the same arguments.
        case_of: the case of some arguments, None where they are out of the kernel's range.
        example: arguments of random data for a case, B rows and L tokens a row.
        exact: what the kernel's results are compared with; None: those of `reference`.
        comparable: brings the results of either into one form, a sequence of arrays.
    """

    name: str
    source: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    case_of: Callable[..., Case | None]
    example: Callable[[Case, int, int], tuple[Any, ...]]
    exact: Callable[..., Any] | None = None
    comparable: Callable[[Any], Sequence[mx.array]] = tuple

    def __call__(self, *arguments: Any) -> Any:
        """The results of the kernel where it runs, of `reference` elsewhere.

        Raises:
            OptionError: the environment asks for kernels that cannot run here, or that do not exist.
        """
        return (self.launch if self.is_chosen(*arguments) else self.reference)(*arguments)

    def is_chosen(self, *arguments: Any) -> bool:
        """Whether a call with these arguments runs the kernel."""
        wish = read_wish()
        if self.name not in wish.names:
            return False
        if not has_metal():
            if wish.is_forced:
                raise OptionError(
                    f"{KERNELS_VARIABLE} is {os.environ[KERNELS_VARIABLE]!r}, but MLX does not compute on Metal here; "
                    "unset it"
                )
            return False
        case = self.case_of(*arguments)
        return case is not None and self.verdict(case, wish.is_forced).permits(is_forced=wish.is_forced)

    def verdict(self, case: Case, is_forced: bool) -> Verdict:
        """What was found on this device; at first use the kernel is tried out, as `verdict_of` says."""
        return verdict_of(self, case, is_forced)


def has_metal() -> bool:
    """Whether MLX computes on Metal."""
    return mx.metal.is_available() and mx.default_device().type != mx.cpu


def read_wish() -> Wish:
    """What LFM_MLX_KERNELS says: "off", "on", or names with commas between; without it, what is faster runs.

    Raises:
        OptionError: it says something else.
    """
    said = os.environ.get(KERNELS_VARIABLE)
    if said is None:
        return Wish(names=frozenset(KERNEL_NAMES), is_forced=False)
    if said in ("on", "off"):
        return Wish(names=frozenset(KERNEL_NAMES if said == "on" else ()), is_forced=said == "on")
    names = said.split(",")
    for name in names:
        if name not in KERNEL_NAMES:
            (nearest,) = difflib.get_close_matches(name, KERNEL_NAMES, n=1, cutoff=0)
            raise OptionError(
                f"{KERNELS_VARIABLE} is {said!r}, expected off, on, or some of {','.join(KERNEL_NAMES)}; "
                f"there is no {name!r} (nearest: {nearest})"
            )
    return Wish(names=frozenset(names), is_forced=True)


def are_alike(*arrays: mx.array) -> bool:
    """Whether arrays have one dtype, and one that kernels know."""
    return arrays[0].dtype in DTYPES and all(array.dtype == arrays[0].dtype for array in arrays)


def random_values(shape: Sequence[int], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normally distributed numbers, the same for the same seed; the global generator is left alone."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
