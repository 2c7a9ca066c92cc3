"""The model against what transformers computed from the same files; tests/golden/dump_golden.py wrote them.

Float32 on both sides. Errors are relative to the largest expected magnitude. A router choice counts as a tie, and is
not compared, where transformers' last chosen expert leads the next by less than `TIE` (scores are in 0..1.x).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error

from lfm_mlx.build import build_model
from lfm_mlx.cache import Span
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.kernels import Routing
from lfm_mlx.model import Model, MoE, Norm

FOLDER = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name for path in FOLDER.iterdir() if (path / "expected.safetensors").exists())
MOE_NAMES = [name for name in NAMES if name.startswith("moe")]
TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE
TIE = 1e-5


Change = Callable[[str, mx.array], mx.array]
"""Tensor of a name -> what stands in its place."""


class Changed:
    """The tensors of a checkpoint with a change to each; `lfm_mlx.build.Weights`."""

    def __init__(self, checkpoint: Checkpoint, change: Change) -> None:
        self.checkpoint = checkpoint
        self.change = change
        self.has = checkpoint.has
        self.quantization_of = checkpoint.quantization_of

    def tensor(self, name: str) -> mx.array:
        """The changed tensor."""
        return self.change(name, self.checkpoint.tensor(name))


def load(
    name: str, change: Change = lambda name, tensor: tensor, **config_changes: Any
) -> tuple[Model, dict[str, mx.array]]:
    """A golden model, as it is or broken, and what transformers computed."""
    checkpoint = Checkpoint(FOLDER / name)
    expected = mx.load(str(FOLDER / name / "expected.safetensors"))
    assert isinstance(expected, dict)
    config = dataclasses.replace(checkpoint.config, **config_changes)
    return build_model(config, Changed(checkpoint, change), mx.float32), expected


def hidden_states(model: Model, tokens: mx.array) -> list[mx.array]:
    """Hidden states after each layer."""
    span = Span.make((0,) * tokens.shape[0], tokens.shape[1])
    x, states = model.embed_tokens(tokens), []
    normed = model.layers[0].operator_norm(x)
    for i, layer in enumerate(model.layers):
        x, normed = layer(x, normed, None, span, model.norm_behind(i))
        states.append(x)
    return states


def greedy(model: Model, tokens: mx.array, num_tokens: int) -> np.ndarray:
    """The greedy continuation, one token a step through a state."""
    state = model.new_state(tokens.shape[0])
    chosen, latest = [], tokens
    for _ in range(num_tokens):
        latest = mx.argmax(model(latest, state)[:, -1:], axis=-1)
        chosen.append(np.array(latest))
    return np.concatenate(chosen, axis=1)


def test_the_golden_folders_cover_every_architecture_that_is_asked_for():
    assert len(NAMES) == 8
    assert len(MOE_NAMES) == 3


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_hidden_states_after_every_layer_equal_those_of_transformers(name):
    model, expected = load(name)
    for layer, found in enumerate(hidden_states(model, expected["tokens"])):
        assert relative_error(found, expected[f"hidden.{layer}"]) < TOLERANCE, f"after layer {layer}"
    assert relative_error(model(expected["tokens"]), expected["logits"]) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_through_a_state_equal_those_of_transformers(name):
    model, expected = load(name)
    wanted = np.array(expected["greedy"])
    np.testing.assert_array_equal(greedy(model, expected["tokens"], wanted.shape[1]), wanted)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_router_choices_and_weights_equal_those_of_transformers(name, monkeypatch):
    model, expected = load(name)
    for layer, routing in routed(model, expected["tokens"], monkeypatch).items():
        clear = np.array(expected[f"margins.{layer}"]) >= TIE
        assert clear.mean() > 0.95
        wanted = by_expert(expected[f"experts.{layer}"], expected[f"weights.{layer}"], model)[clear]
        found = by_expert(routing.experts, weights_of(routing, model), model)[clear]
        np.testing.assert_array_equal(found > 0, wanted > 0)
        assert relative_error(found, wanted) < TOLERANCE


def weights_of(routing: Routing, model: Model) -> mx.array:
    """Expert weights (T, A)."""
    if routing.is_weighed:
        return routing.scores
    weights = mx.sigmoid(routing.scores)
    if model.config.normalize_expert_weights:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-6)
    return weights * model.config.routed_scaling_factor


def routed(model: Model, tokens: mx.array, monkeypatch: pytest.MonkeyPatch) -> dict[int, Routing]:
    """What each MoE layer's router chose, by layer."""
    route, choices = MoE.route, {}
    layer_of = {id(layer.feed_forward): i for i, layer in enumerate(model.layers)}

    def recording(self, x):
        choices[layer_of[id(self)]] = route(self, x)
        return choices[layer_of[id(self)]]

    monkeypatch.setattr(MoE, "route", recording)
    model(tokens)
    assert len(choices) == model.config.num_layers - model.config.num_dense_layers
    return choices


def by_expert(experts: mx.array, weights: mx.array, model: Model) -> np.ndarray:
    """Weights (T, E), zero for experts that were not chosen: equal whatever the order of the choices."""
    spread = np.zeros((experts.shape[0], model.config.num_experts))
    np.put_along_axis(spread, np.array(experts).astype(np.int64), np.array(weights), axis=-1)
    return spread


def reverse_taps(name: str, tensor: mx.array) -> mx.array:
    return tensor[:, ::-1] if name.endswith(".conv.conv.weight") else tensor


def rotate_conv_gates(name: str, tensor: mx.array) -> mx.array:
    return mx.roll(tensor, tensor.shape[0] // 3, axis=0) if name.endswith("conv.in_proj.weight") else tensor


def leave_out_qk_norm_weights(name: str, tensor: mx.array) -> mx.array:
    return mx.ones_like(tensor) if name.endswith("_layernorm.weight") else tensor


def interleave_rotated_pairs(name: str, tensor: mx.array) -> mx.array:
    """As if RoPE turned neighbours instead of halves."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.reshape(-1, 2, 4, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)


def leave_out_the_final_norm(name: str, tensor: mx.array) -> mx.array:
    return mx.ones_like(tensor) if name == "model.embedding_norm.weight" else tensor


BREAKAGES = (
    reverse_taps,
    rotate_conv_gates,
    leave_out_qk_norm_weights,
    interleave_rotated_pairs,
    leave_out_the_final_norm,
)


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.__name__)
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_control_a_broken_tensor_moves_the_logits_far_beyond_the_tolerance(name, breakage: Change):
    model, expected = load(name, breakage)
    assert relative_error(model(expected["tokens"]), expected["logits"]) > BROKEN


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dense", {"rope_theta": 2e6}),
        ("dense", {"norm_eps": 0.05}),
        ("dense", {"rope_theta": 1e4}),
        ("moe_taps4_untied", {"normalize_expert_weights": True}),
        ("moe_taps4_untied", {"routed_scaling_factor": 1.0}),
        ("moe_taps4_untied", {"tie_embeddings": True}),
        ("moe", {"num_active_experts": 4}),
    ],
    ids=str,
)
def test_control_each_option_of_the_config_changes_the_logits(name, changes):
    model, expected = load(name, **changes)
    assert relative_error(model(expected["tokens"]), expected["logits"]) > BROKEN


def test_control_greedy_tokens_of_a_broken_model_differ():
    model, expected = load("dense", reverse_taps)
    wanted = np.array(expected["greedy"])
    assert (greedy(model, expected["tokens"], wanted.shape[1]) != wanted).any()


def sigmoid_and_bias(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return mx.sigmoid(logits) + bias, mx.sigmoid(logits)


def softmax_and_folded_bias(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm before commit 04a19108."""
    scores = mx.softmax(logits, axis=-1) + bias
    return scores, scores


def softmax(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return mx.softmax(logits, axis=-1) + bias, mx.softmax(logits, axis=-1)


def folded_bias(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return mx.sigmoid(logits) + bias, mx.sigmoid(logits) + bias


def no_bias(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    return mx.sigmoid(logits), mx.sigmoid(logits)


def plain_moe(policy: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]) -> Callable[..., Any]:
    """A mixture of experts that asks every expert, with `policy` giving what experts are ranked and weighed by."""

    def call(self: MoE, x: mx.array, residual: mx.array, norm: Norm) -> tuple[mx.array, mx.array]:
        ranked, scores = policy(self.gate(x), self.expert_bias)  # (B, L, E)
        last_chosen = mx.sort(ranked, axis=-1)[..., -self.num_active, None]
        weights = mx.where(ranked >= last_chosen, scores, 0)
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-6)
        gate, up = mx.split(mx.einsum("bld,efd->blef", x, self.gate_up_proj.weight), 2, axis=-1)
        outputs = mx.einsum("blef,edf->bled", gate * mx.sigmoid(gate) * up, self.down_proj.weight)
        summed = residual + (weights[..., None] * outputs).sum(axis=2)
        return summed, norm(summed)

    return call


def plain_error(policy, monkeypatch) -> float:
    model, expected = load("moe")
    monkeypatch.setattr(MoE, "__call__", plain_moe(policy))
    return relative_error(model(expected["tokens"]), expected["logits"])


def test_a_router_that_ranks_by_sigmoid_plus_bias_and_weighs_by_sigmoid_is_what_transformers_has(monkeypatch):
    assert plain_error(sigmoid_and_bias, monkeypatch) < TOLERANCE


@pytest.mark.parametrize("policy", [softmax_and_folded_bias, softmax, folded_bias, no_bias], ids=lambda f: f.__name__)
def test_control_a_router_with_a_known_bug_moves_the_logits_far_beyond_the_tolerance(policy, monkeypatch):
    assert plain_error(policy, monkeypatch) > BROKEN
