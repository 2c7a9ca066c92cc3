"""Named geometries and the weights made up for them."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.bench.peer import made_up_peer
from lfm_mlx.bench.shapes import SHAPES, RandomWeights, ViewWeights, config_named, made_up_model
from lfm_mlx.bench.sides import Ours
from lfm_mlx.distributed import RankPart, cut_of, take_part
from lfm_mlx.distributed.cut import Mode
from lfm_mlx.errors import OptionError
from lfm_mlx.names import expected_tensors

PARAMETERS = {
    "lfm2.5-8b-a1b": 8_467_856_832,
    "lfm2-8b-a1b": 8_339_930_560,
    "lfm2.5-2.6b": 2_697_198_592,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-700m": 742_489_344,
    "lfm2-350m": 354_483_968,
}
"""Totals on the model cards."""


@pytest.mark.parametrize(("name", "total"), PARAMETERS.items())
def test_geometries_have_as_many_parameters_as_the_model_cards_say(name: str, total: int) -> None:
    assert sum(math.prod(shape) for shape in expected_tensors(config_named(name)).values()) == total


@pytest.mark.parametrize("name", SHAPES)
def test_every_geometry_builds_without_memory(name: str) -> None:
    before = mx.get_active_memory()
    model = made_up_model(ViewWeights(config_named(name)), mx.bfloat16)
    assert len(model.layers) == model.config.num_layers
    assert mx.get_active_memory() - before < 20_000_000


def test_an_unknown_geometry_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"nearest: lfm2\.5-8b-a1b"):
        config_named("lfm2.5-8b")


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["tiny-moe", "tiny-dense"])
def test_both_sides_compute_the_same_finite_logits(name: str, bits: int) -> None:
    weights = RandomWeights(config_named(name), bits)
    ours, peer = Ours(made_up_model(weights, mx.float32)), made_up_peer(weights, mx.float32)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    found = []
    for side in (ours, peer):
        rows = side.new_rows([0], capacity=8)
        first = side.prefill(rows, tokens)
        mx.eval(first, side.arrays(rows))
        found.append(np.array(mx.concatenate([first, side.logits(rows, mx.array([9]))])))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=2e-3 * np.abs(found[1]).max())
    assert np.abs(found[0][0] - found[0][1]).max() > 0.1 * np.abs(found[1]).max()


def test_a_tensor_of_the_same_name_is_the_same_and_of_another_is_not() -> None:
    weights = [RandomWeights(config_named("tiny-moe")) for _ in range(2)]
    first, again = (made.tensor("model.layers.0.conv.in_proj.weight") for made in weights)
    other = weights[0].tensor("model.layers.2.conv.in_proj.weight")
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)


@pytest.mark.parametrize("mode", ["tensor", "expert"])
def test_a_made_up_part_is_as_large_as_one_cut_out_of_the_whole(mode: Mode) -> None:
    views = ViewWeights(config_named("lfm2.5-8b-a1b"))
    drawn, part = RandomWeights(config_named("tiny-moe")), RankPart(rank=1, size=2, mode=mode)
    for weights in (views, drawn):
        for name in weights.shapes:
            cut = cut_of(name, mode)
            if cut is not None:
                made, wanted = weights.tensor_part(name, cut, part), take_part(weights.tensor(name), cut, part)
                assert (made.shape, made.dtype) == (wanted.shape, wanted.dtype), name
    cut = cut_of("model.embed_tokens.weight", mode)
    assert cut is not None
    parts = [drawn.tensor_part("model.embed_tokens.weight", cut, RankPart(rank=rank, size=2)) for rank in (0, 1)]
    assert not mx.array_equal(*parts)
