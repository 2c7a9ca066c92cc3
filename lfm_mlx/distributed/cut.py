"""Which part of every tensor a rank holds: whole numbers, no arrays.

Matrices whose outputs are independent of each other (heads, channels, feed-forward width, vocabulary) are cut by rows,
and those that bring these together again by columns, so that only their results have to be added across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.errors import OptionError
from lfm_mlx.names import EMBEDDING, HEAD, expected_tensors

Mode = Literal["tensor", "expert"]
"""Whether experts are cut by their width, like all other matrices, or dealt out whole."""

MAX_RANKS = 64
"""Numbers of ranks that are looked at when those that work are listed."""


@dataclass(frozen=True, kw_only=True)
class RankPart:
    """RankPart `rank` of `size` equal ones."""

    rank: int
    size: int
    mode: Mode = "tensor"

    @property
    def name(self) -> str:
        """What tells it from parts of this and other cuts: "tensor-2-0"."""
        return f"{self.mode}-{self.size}-{self.rank}"

    def of(self, total: int) -> range:
        """This part of `total` things."""
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)


class Cut(NamedTuple):
    """How a tensor is cut: along `axis`, each of its `num_pieces` equal stretches by itself."""

    axis: int
    num_pieces: int = 1

    def ranges(self, length: int, part: RankPart) -> list[range]:
        """What a rank has of an axis of `length` places: one range a piece."""
        piece = length // self.num_pieces
        mine = part.of(piece)
        return [range(i * piece + mine.start, i * piece + mine.stop) for i in range(self.num_pieces)]


_ROWS, _COLUMNS, _THIRDS = Cut(0), Cut(-1), Cut(0, 3)

_CUTS: Mapping[str, Cut] = {
    "self_attn.q_proj.weight": _ROWS,
    "self_attn.k_proj.weight": _ROWS,
    "self_attn.v_proj.weight": _ROWS,
    "self_attn.out_proj.weight": _COLUMNS,
    "conv.in_proj.weight": _THIRDS,
    "conv.in_proj.bias": _THIRDS,
    "conv.conv.weight": _ROWS,
    "conv.conv.bias": _ROWS,
    "conv.out_proj.weight": _COLUMNS,
    "feed_forward.w1.weight": _ROWS,
    "feed_forward.w3.weight": _ROWS,
    "feed_forward.w2.weight": _COLUMNS,
    "feed_forward.gate_proj.weight": _ROWS,
    "feed_forward.up_proj.weight": _ROWS,
    "feed_forward.down_proj.weight": _COLUMNS,
    "feed_forward.switch_mlp.gate_proj.weight": Cut(1),
    "feed_forward.switch_mlp.up_proj.weight": Cut(1),
    "feed_forward.switch_mlp.down_proj.weight": Cut(2),
}
"""By the name inside a layer; what is not here (norms, routers, the bias of a sum) every rank holds whole."""


def cut_of(name: str, mode: Mode) -> Cut | None:
    """How our tensor `name` is cut; None for one that every rank holds whole.

    Args:
        name: of a weight or bias, or of the scales or biases of a quantised weight, which are cut alike.
        mode: what becomes of experts.
    """
    path, _, part = name.rpartition(".")
    name = f"{path}.weight" if part in ("scales", "biases") else name
    if name in (EMBEDDING, HEAD):
        return _ROWS
    inside = name.split(".", 3)[3] if name.startswith("model.layers.") else name
    cut = _CUTS.get(inside)
    return _ROWS if cut is not None and mode == "expert" and ".switch_mlp." in name else cut


def local_config(config: ModelConfig, part: RankPart) -> ModelConfig:
    """The architecture as one rank sees it: its heads, channels and widths. Vocabulary and experts count as before."""
    size = part.size
    return replace(
        config,
        num_heads=config.num_heads // size,
        num_kv_heads=config.num_kv_heads // size,
        conv_size=config.conv_size // size,
        ffn_size=config.ffn_size // size,
        expert_ffn_size=config.expert_ffn_size // (size if part.mode == "tensor" else 1),
    )


class Storage(Protocol):
    """What has to be known of how matrices are stored."""

    def quantization_of(self, name: str) -> Quantization | None:
        """How the matrix ``X.weight`` is stored; None when unquantised."""
        ...


def check_size(config: ModelConfig, storage: Storage, size: int, mode: Mode) -> None:
    """Refuse a number of ranks that does not divide the model evenly.

    Raises:
        OptionError: with what does not divide, and the numbers that work.
    """
    option = f"--{mode}-parallel"
    if mode == "expert" and not config.is_moe:
        raise OptionError(f"{option} was given, but the model has no experts; use --tensor-parallel {size}")
    problems = _problems(config, storage, size, mode)
    if problems:
        working = working_sizes(config, storage, mode)
        listed = ", ".join(map(str, working[:-1])) + " or " * (len(working) > 1) + str(working[-1])
        raise OptionError(f"{option} is {size}, expected {listed} for this model: {problems[0]}")


def working_sizes(config: ModelConfig, storage: Storage, mode: Mode) -> list[int]:
    """The numbers of ranks, up to `MAX_RANKS`, that divide a model evenly; 1 is always one of them."""
    return [size for size in range(1, MAX_RANKS + 1) if not _problems(config, storage, size, mode)]


def _problems(config: ModelConfig, storage: Storage, size: int, mode: Mode) -> list[str]:
    """What cannot be cut into `size` equal parts."""
    counts = {"num_key_value_heads": config.num_kv_heads, "vocab_size": config.vocab_size}
    if mode == "expert":
        counts["num_experts"] = config.num_experts
    problems = [f"{name} {count} is no multiple of it" for name, count in counts.items() if count % size]
    return problems + [
        f"{width} columns of {name} would be cut inside a group of {unit}"
        if width % size == 0
        else f"{width} columns of {name} are no multiple of it"
        for name, width, unit in _columns(config, storage, mode)
        if width % (size * unit)
    ]


def _columns(config: ModelConfig, storage: Storage, mode: Mode) -> Sequence[tuple[str, int, int]]:
    """Name, width and group size of every matrix that is cut by columns; one of each kind and storage."""
    found: dict[tuple[str, int], tuple[str, int, int]] = {}
    for name, shape in expected_tensors(config).items():
        cut = cut_of(name, mode)
        if cut is not None and cut.axis in (-1, 2):
            stored = storage.quantization_of(name)
            unit = stored.group_size if stored is not None else 1
            kind = name.split(".", 3)[3]
            found.setdefault((kind, unit), (kind.removesuffix(".weight"), shape[-1], unit))
    return list(found.values())


def part_bytes(name: str, num_bytes: int, part: RankPart) -> int:
    """Bytes that one rank holds of a tensor of so many."""
    return num_bytes // part.size if cut_of(name, part.mode) is not None else num_bytes
