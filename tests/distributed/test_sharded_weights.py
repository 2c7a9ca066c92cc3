"""What a rank reads is the same bits that the whole tensor has there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from random_models import as_hugging_face, random_weights, tiny_config, write_checkpoint, write_tensors

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import Quantization
from lfm_mlx.distributed import RankPart, ShardedWeights, cut_of, part_file

RAW = tiny_config(
    hidden_size=128,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    layer_types=["conv", "full_attention"],
    conv_bias=True,
    vocab_size=96,
)


def hugging_face(folder: Path) -> Path:
    return write_tensors(folder, RAW, as_hugging_face(random_weights(RAW)), num_shards=2)


def in_4_bits(folder: Path) -> Path:
    return write_checkpoint(folder, RAW, stored=lambda path: Quantization(group_size=32))


def joined(parts: list[mx.array], axis: int, num_pieces: int) -> mx.array:
    """The whole out of all ranks' parts."""
    if num_pieces == 1:
        return mx.concatenate(parts, axis=axis)
    pieces = [mx.split(part, num_pieces, axis=axis) for part in parts]
    return mx.concatenate([mx.concatenate(list(same), axis=axis) for same in zip(*pieces, strict=True)], axis=axis)


@pytest.mark.parametrize("mode", ["tensor", "expert"])
@pytest.mark.parametrize("write", [hugging_face, in_4_bits])
def test_parts_are_slices_of_the_whole_bit_for_bit(
    write: Any, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_file, "STRETCH_BYTES", 1000)  # Some tensors in one way, some in the other.
    monkeypatch.setattr(part_file, "SCRATCH_BYTES", 20_000)
    checkpoint = Checkpoint(write(tmp_path))
    ranks = [RankPart(rank=rank, size=2, mode=mode) for rank in range(2)]
    views = [ShardedWeights(checkpoint, part, checkpoint.tensor_part) for part in ranks]
    for name in checkpoint.names:
        whole, parts, cut = checkpoint.tensor(name), [view.tensor(name) for view in views], cut_of(name, mode)
        found = parts[0] if cut is None else joined(parts, cut.axis, cut.num_pieces)
        assert found.dtype == whole.dtype, name
        assert mx.array_equal(found, whole), name
        by_slicing = ShardedWeights(checkpoint, ranks[1]).tensor(name)
        assert mx.array_equal(by_slicing, parts[1]), name


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(OSError, match="ends 4 bytes too early"):
        part_file.read_ranges(tmp_path / "short", 0, (4, 2), "U8", 0, [range(0, 4)])
