"""Which part of each tensor a rank has, and which numbers of ranks there can be."""

from __future__ import annotations

from typing import Any

import pytest
from random_models import tiny_config, tiny_dense_config

from lfm_mlx.bench.shapes import RandomWeights, config_named
from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.distributed import Cut, RankPart, check_size, cut_of, local_config, part_bytes
from lfm_mlx.distributed.cut import working_sizes
from lfm_mlx.errors import OptionError
from lfm_mlx.names import expected_tensors


class InGroupsOf:
    """Every matrix in 4 bits, in groups of one size; of None, unquantised."""

    def __init__(self, group_size: int | None) -> None:
        self.stored = Quantization(group_size=group_size) if group_size is not None else None

    def quantization_of(self, name: str) -> Quantization | None:
        return self.stored


def test_ranks_together_have_every_place_once() -> None:
    parts = [Cut(0, 3).ranges(24, RankPart(rank=rank, size=4)) for rank in range(4)]
    assert parts[1] == [range(2, 4), range(10, 12), range(18, 20)]
    assert sorted(place for ranges in parts for places in ranges for place in places) == list(range(24))


def test_scales_and_biases_are_cut_as_their_weight_is() -> None:
    for name in ("model.embed_tokens", "model.layers.3.self_attn.out_proj", "model.layers.2.conv.in_proj"):
        cuts = {cut_of(f"{name}.{part}", "tensor") for part in ("weight", "scales", "biases")}
        assert len(cuts) == 1
        assert None not in cuts
    assert cut_of("model.layers.2.feed_forward.gate.weight", "tensor") is None
    assert cut_of("model.layers.2.operator_norm.weight", "tensor") is None


@pytest.mark.parametrize(
    ("mode", "group_size", "sizes"),
    [
        ("tensor", 64, [1, 2, 4]),
        ("tensor", 32, [1, 2, 4, 8]),
        ("expert", 64, [1, 2, 4, 8]),
        ("tensor", None, [1, 2, 4, 8]),
    ],
)
def test_sizes_that_work_for_the_real_model(mode: Any, group_size: int | None, sizes: list[int]) -> None:
    config = config_named("lfm2.5-8b-a1b")
    assert working_sizes(config, InGroupsOf(group_size), mode) == sizes


def test_a_size_that_cuts_inside_a_group_is_refused_with_those_that_work() -> None:
    config = config_named("lfm2.5-8b-a1b")
    check_size(config, InGroupsOf(64), 4, "tensor")
    with pytest.raises(OptionError, match=r"--tensor-parallel is 8, expected 1, 2 or 4 .*down_proj.*group of 64"):
        check_size(config, InGroupsOf(64), 8, "tensor")
    with pytest.raises(OptionError, match=r"--tensor-parallel is 3, expected .*num_key_value_heads 8"):
        check_size(config, InGroupsOf(64), 3, "tensor")


def test_experts_of_a_dense_model_cannot_be_dealt_out() -> None:
    config = ModelConfig.from_dict(tiny_dense_config())
    with pytest.raises(OptionError, match="no experts; use --tensor-parallel 2"):
        check_size(config, InGroupsOf(None), 2, "expert")


@pytest.mark.parametrize("mode", ["tensor", "expert"])
def test_a_rank_counts_with_its_own_widths(mode: Any) -> None:
    config = ModelConfig.from_dict(tiny_config())
    local = local_config(config, RankPart(rank=1, size=2, mode=mode))
    assert (local.num_heads, local.num_kv_heads, local.conv_size, local.ffn_size) == (2, 1, 16, 24)
    assert local.expert_ffn_size == (12 if mode == "tensor" else 24)
    assert (local.hidden_size, local.vocab_size, local.num_experts) == (32, 97, 8)


def test_nearly_everything_is_cut_at_full_size() -> None:
    weights = RandomWeights(config_named("lfm2.5-8b-a1b"))
    sizes = {}
    for name in expected_tensors(weights.config):
        stored = weights._stored_as(name)
        sizes[name] = stored[1].size
        for axis in stored[0]:
            sizes[name] *= axis
    part = RankPart(rank=0, size=4)
    assert sum(part_bytes(name, size, part) for name, size in sizes.items()) < 1.002 * sum(sizes.values()) / 4
