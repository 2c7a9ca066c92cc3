"""The mixture of experts: sorted and paired dispatch agree, and both with every expert asked."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error, tiny_config, tiny_model

from lfm_mlx.config import Quantization
from lfm_mlx.kernels import Routing
from lfm_mlx.model import MoE, Norm
from lfm_mlx.model.moe import SORTED_FROM_TOKENS, pair_rows

TOLERANCE = 1e-5
WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 64}
NORM = Norm(mx.ones((64,)), 1e-5)


def quantised(path: str) -> Quantization | None:
    return Quantization(group_size=64, bits=4) if "switch_mlp" in path else None


def split(path: str) -> Quantization | None:
    """Gate and up in different storage."""
    by_ending = {"gate_proj": Quantization(group_size=32, bits=8), "up_proj": Quantization(group_size=64, bits=4)}
    return by_ending.get(path.rsplit(".", 1)[-1]) if "switch_mlp" in path else None


@pytest.fixture(scope="module", params=[None, quantised, split], ids=["plain", "quantised", "split"])
def moe(request) -> MoE:
    return tiny_model(tiny_config(**WIDTHS), stored=request.param).layers[1].feed_forward


def hidden(num_tokens: int, seed: int = 0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal((1, num_tokens, 64))
    return mx.array(values.astype(np.float32))


def called(moe: MoE, x: mx.array, residual: mx.array) -> mx.array:
    """The layer's output with the residual in it; the norm behind it is left out."""
    return moe(x, residual, NORM)[0]


def in_calls_of(moe: MoE, x: mx.array, size: int) -> mx.array:
    parts = [x[:, start : start + size] for start in range(0, x.shape[1], size)]
    return mx.concatenate([called(moe, part, part) for part in parts], axis=1)


@pytest.mark.parametrize("num_tokens", [SORTED_FROM_TOKENS - 1, SORTED_FROM_TOKENS, SORTED_FROM_TOKENS + 1, 100])
def test_tokens_sorted_by_expert_give_what_single_tokens_give(moe, num_tokens):
    x = hidden(num_tokens)
    assert relative_error(called(moe, x, x), in_calls_of(moe, x, 1)) < TOLERANCE
    assert relative_error(in_calls_of(moe, x, 7), in_calls_of(moe, x, 1)) < TOLERANCE


def test_many_pairs_are_computed_in_blocks_of_sorted_ones(moe, monkeypatch):
    x = hidden(100)
    whole = called(moe, x, x)
    seen: list[int] = []
    down = type(moe.down_proj).__call__

    def watched(self, x, *arguments, **options):
        if self is moe.down_proj:
            seen.append(x.shape[0])
        return down(self, x, *arguments, **options)

    monkeypatch.setattr("lfm_mlx.model.moe.BLOCK_PAIRS", 64)
    monkeypatch.setattr(type(moe.down_proj), "__call__", watched)
    assert relative_error(called(moe, x, x), whole) < TOLERANCE
    assert seen == [64] * 4 + [44]


def test_a_dense_layer_takes_many_tokens_in_blocks(monkeypatch):
    mlp = tiny_model(tiny_config(**WIDTHS)).layers[0].feed_forward
    x = hidden(100)
    whole = mlp(x, x, NORM)
    monkeypatch.setattr("lfm_mlx.model.mlp.BLOCK_TOKENS", 32)
    for found, expected in zip(mlp(x, x, NORM), whole, strict=True):
        assert found.shape == expected.shape
        assert relative_error(found, expected) < TOLERANCE
    assert relative_error(mlp(x[:, ::-1], x, NORM)[0], whole[0]) > 0.01


def paired_outputs(patch: pytest.MonkeyPatch, moe: MoE, x: mx.array, experts: mx.array) -> mx.array:
    """Experts' outputs (T, A D) as `step` has them before it weighs and adds them; x (T, D), experts (T, A)."""
    A = moe.num_active
    with patch.context() as during:
        routing = Routing(experts[:, None, None], mx.zeros((x.shape[0], 1, 1, A)), False)
        during.setattr(MoE, "route", lambda self, tokens: routing)
        during.setattr(MoE, "_combine", lambda self, residual, outputs, routing, norm: outputs)
        return moe.step(x[:, None, None], mx.zeros_like(x)[:, None, None], NORM).reshape(x.shape[0], -1)


@pytest.mark.parametrize("num_tokens", [5, 50])
def test_the_two_dispatches_give_the_same_experts_outputs(moe, monkeypatch, num_tokens):
    x = hidden(num_tokens)[0]
    experts = moe.route(x).experts
    assert relative_error(moe._sorted(x, experts), paired_outputs(monkeypatch, moe, x, experts)) < TOLERANCE


def test_control_experts_assigned_to_other_tokens_are_noticed(moe, monkeypatch):
    x = hidden(50)[0]
    experts = moe.route(x).experts
    assert relative_error(moe._sorted(x, experts[::-1]), paired_outputs(monkeypatch, moe, x, experts)) > 0.1


@pytest.mark.parametrize("num_tokens", [1, SORTED_FROM_TOKENS, 100])
def test_a_step_of_any_number_of_tokens_gives_what_single_tokens_give(moe, num_tokens):
    x, residual = hidden(num_tokens), hidden(num_tokens, seed=1)
    stepped, normed = moe.step(x[0, :, None, None], residual[0, :, None, None], NORM)
    assert stepped.shape == normed.shape == (num_tokens, 1, 1, 64)
    assert relative_error(normed, NORM(stepped)) < TOLERANCE
    expected = mx.concatenate([called(moe, x[:, i : i + 1], residual[:, i : i + 1]) for i in range(num_tokens)], axis=1)
    assert relative_error(stepped[:, 0, 0], expected[0]) < TOLERANCE


def test_each_pair_reads_its_tokens_row_first_and_its_own_afterwards():
    tokens, pairs = pair_rows(3, 2)
    assert tokens.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert tokens.dtype == pairs.dtype == mx.uint32
    assert pair_rows(3, 2)[0] is tokens


def test_many_tokens_may_choose_the_same_experts():
    moe = tiny_model(tiny_config(**WIDTHS)).layers[1].feed_forward
    moe.expert_bias = mx.array([9.0, 9.0, 9.0, 0, 0, 0, 0, 0])
    x = hidden(64)
    experts = moe.route(x[0]).experts
    assert set(np.array(experts).flatten().tolist()) == {0, 1, 2}
    assert relative_error(called(moe, x, x), in_calls_of(moe, x, 1)) < TOLERANCE


def test_the_router_bias_chooses_and_never_weighs():
    moe = tiny_model(tiny_config(**WIDTHS)).layers[1].feed_forward
    x = hidden(40)
    before = np.array(called(moe, x, x))
    moe.expert_bias = moe.expert_bias + 5
    np.testing.assert_allclose(np.array(called(moe, x, x)), before, rtol=1e-5, atol=1e-5)
    moe.expert_bias = moe.expert_bias[::-1] * mx.array([1.0, -1] * 4)
    assert np.abs(np.array(called(moe, x, x)) - before).max() > 0.1


def test_the_residual_is_added_once(moe):
    x, residual = hidden(6), hidden(6, seed=1)
    assert relative_error(called(moe, x, residual) - residual, called(moe, x, mx.zeros_like(x))) < TOLERANCE


@pytest.mark.parametrize("num_active", [1, 8], ids=["one", "all"])
def test_one_expert_or_all_of_them_may_be_active(num_active):
    moe = tiny_model(tiny_config(**WIDTHS, num_experts_per_tok=num_active)).layers[1].feed_forward
    x = hidden(40)
    experts = moe.route(x[0]).experts
    assert experts.shape == (40, num_active)
    assert relative_error(called(moe, x, x), in_calls_of(moe, x, 1)) < TOLERANCE
