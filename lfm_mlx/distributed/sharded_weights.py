"""A checkpoint as one rank sees it: the same names, its part of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from lfm_mlx.config import Quantization
from lfm_mlx.distributed.cut import Cut, RankPart, cut_of

ReadPart = Callable[[str, Cut, RankPart], mx.array]
"""A tensor's name, how it is cut, and the part wanted -> that part."""


class WholeWeights(Protocol):
    """Our tensors by name, whole: `lfm_mlx.build.Weights`."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def tensor(self, name: str) -> mx.array:
        """The tensor, unevaluated."""
        ...

    def quantization_of(self, name: str) -> Quantization | None:
        """How the matrix ``X.weight`` is stored; None when unquantised."""
        ...


class ShardedWeights:
    """`lfm_mlx.build.Weights` of one rank.

    Args:
        weights: of the whole model, which can be cut (`check_size`).
        part: the rank's.
        read: reads a part of a tensor without the rest, as `lfm_mlx.checkpoint.Checkpoint.tensor_part` does; None
            takes it out of the whole tensor.
    """

    def __init__(self, weights: WholeWeights, part: RankPart, read: ReadPart | None = None) -> None:
        self.part = part
        self._weights = weights
        self._read = read if read is not None else self._taken_out

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return self._weights.has(name)

    def quantization_of(self, name: str) -> Quantization | None:
        """How the matrix ``X.weight`` is stored; None when unquantised."""
        return self._weights.quantization_of(name)

    def tensor(self, name: str) -> mx.array:
        """The rank's part of the tensor."""
        cut = cut_of(name, self.part.mode)
        return self._weights.tensor(name) if cut is None else self._read(name, cut, self.part)

    def _taken_out(self, name: str, cut: Cut, part: RankPart) -> mx.array:
        return take_part(self._weights.tensor(name), cut, part)


def take_part(whole: mx.array, cut: Cut, part: RankPart) -> mx.array:
    """A rank's part of a tensor, unevaluated."""
    axis = cut.axis % whole.ndim
    pieces = [mx.take(whole, mx.arange(at.start, at.stop), axis=axis) for at in cut.ranges(whole.shape[axis], part)]
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
