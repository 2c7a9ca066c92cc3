"""Random architectures and weights against transformers, live; needs the `oracle` extra (torch, transformers).

Float32 on both sides. Errors are relative to the largest logit. Router choices count as ties below `TIE`; draws whose
greedy continuation holds a lead below `SMALLEST_LEAD` of the largest logit are drawn again.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_models import relative_error

from lfm_mlx.build import build_model
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.model import Model, MoE

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (pip install 'lfm-mlx[oracle]')"
)

TOLERANCE = 1e-5
BROKEN = 100 * TOLERANCE
TIE = 1e-5
SMALLEST_LEAD = 1e-4
NUM_DRAWS = 12
NUM_GREEDY = 30


@functools.cache
def oracle() -> ModuleType:
    """The script that dumps the golden files: its model maker and its hooks; takes seconds to import."""
    path = Path(__file__).parent / "golden" / "dump_golden.py"
    spec = importlib.util.spec_from_file_location("dump_golden", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dump_golden"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    module.torch.set_num_threads(1)
    return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """A random checkpoint on disk, and what transformers computes from it."""

    folder: Path
    tokens: mx.array
    expected: dict[str, np.ndarray]


def random_config(generator: np.random.Generator, *, is_moe: bool) -> Any:
    """An architecture with random sizes."""
    import transformers  # takes seconds

    pick = lambda *values: values[generator.integers(len(values))]  # noqa: E731
    num_kv_heads, head_dim, num_layers = pick(1, 2, 3), 2 * int(generator.integers(2, 9)), int(generator.integers(2, 6))
    num_heads = num_kv_heads * pick(1, 2, 4)
    kinds = [pick("conv", "full_attention") for _ in range(num_layers)]
    kinds[int(generator.integers(num_layers))] = "full_attention"
    values = {
        "vocab_size": int(generator.integers(20, 150)),
        "num_hidden_layers": num_layers,
        "layer_types": kinds,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": int(generator.integers(8, 120)),
        "conv_L_cache": pick(2, 3, 3, 4, 5),
        "conv_bias": pick(False, True),
        "tie_word_embeddings": pick(True, False),
        "norm_eps": pick(1e-5, 1e-6, 1e-3),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(pick(1e2, 1e4, 1e6, 1e7))},
        "eos_token_id": None,
    }
    if is_moe:
        num_experts = int(generator.integers(2, 12))
        return transformers.Lfm2MoeConfig(
            **values,
            hidden_size=num_heads * head_dim,
            moe_intermediate_size=int(generator.integers(4, 40)),
            num_experts=num_experts,
            num_experts_per_tok=int(generator.integers(1, num_experts)),
            num_dense_layers=int(generator.integers(0, num_layers)),
            use_expert_bias=pick(True, True, False),
            norm_topk_prob=pick(True, True, False),
            routed_scaling_factor=pick(1.0, 1.0, 2.5),
        )
    return transformers.Lfm2Config(
        **values,
        hidden_size=pick(num_heads * head_dim, 40),
        head_dim=head_dim,
        block_auto_adjust_ff_dim=pick(True, False),
        block_multiple_of=pick(1, 16, 256),
        block_ffn_dim_multiplier=pick(1.0, 1.3),
    )


def with_version_4_keys(folder: Path) -> None:
    """Rewrite config.json as transformers 4 spelled it."""
    raw = json.loads((folder / "config.json").read_text())
    raw["rope_theta"] = raw.pop("rope_parameters")["rope_theta"]
    raw["torch_dtype"] = raw.pop("dtype")
    raw["tie_embedding"] = raw.pop("tie_word_embeddings")
    if raw["model_type"] == "lfm2":
        raw["full_attn_idxs"] = [i for i, kind in enumerate(raw.pop("layer_types")) if kind == "full_attention"]
        raw["block_ff_dim"] = raw["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(raw))


def draw_checkpoint(folder: Path, number: int) -> Draw:
    """Draw `number`: odd ones have experts; sharding, stored dtype and config style go round."""
    torch = oracle().torch
    for attempt in range(10):
        generator = np.random.default_rng([number, attempt])
        torch.manual_seed(number + 1000 * attempt)
        dtype = (torch.float32, torch.bfloat16)[number // 2 % 2]
        model = oracle().random_model(random_config(generator, is_moe=bool(number % 2))).to(dtype)
        model.save_pretrained(folder, max_shard_size=("50GB", "30KB")[number // 4 % 2])
        # Read back rather than cast back: a cast to bfloat16 rounds the frequencies of RoPE for good.
        model = type(model).from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
        tokens = torch.from_numpy(generator.integers(0, model.config.vocab_size, (2, 24)))
        expected = oracle().observed(model, tokens) | oracle().greedy(model, tokens, NUM_GREEDY)
        if float(expected["greedy_margin"]) > SMALLEST_LEAD:
            break
        for path in folder.iterdir():
            path.unlink()
    if number % 3 == 0:
        with_version_4_keys(folder)
    assert (folder / "model.safetensors.index.json").exists() == bool(number // 4 % 2)
    arrays = {name: value.numpy() for name, value in expected.items()}
    return Draw(folder=folder, tokens=mx.array(tokens.numpy().astype(np.int32)), expected=arrays)


@pytest.fixture(scope="module", params=range(NUM_DRAWS))
def draw(request, tmp_path_factory) -> Draw:
    return draw_checkpoint(tmp_path_factory.mktemp("draw"), request.param)


def load(draw: Draw) -> Model:
    checkpoint = Checkpoint(draw.folder)
    return build_model(checkpoint.config, checkpoint, mx.float32)


def test_logits_equal_those_of_transformers(draw):
    assert relative_error(load(draw)(draw.tokens), draw.expected["logits"]) < TOLERANCE


def test_greedy_tokens_through_a_state_equal_those_of_transformers(draw):
    model = load(draw)
    state, latest, chosen = model.new_state(2), draw.tokens, []
    for _ in range(NUM_GREEDY):
        latest = mx.argmax(model(latest, state)[:, -1:], axis=-1)
        chosen.append(np.array(latest))
    np.testing.assert_array_equal(np.concatenate(chosen, axis=1), draw.expected["greedy"])


def test_router_choices_equal_those_of_transformers(draw, monkeypatch):
    model, route, chosen = load(draw), MoE.route, []

    def recording(self, tokens):
        result = route(self, tokens)
        chosen.append(np.sort(np.array(result[0]), axis=-1))
        return result

    monkeypatch.setattr(MoE, "route", recording)
    model(draw.tokens)
    layers = [i for i in range(model.config.num_layers) if model.config.has_experts(i)]
    assert len(chosen) == len(layers)
    for layer, found in zip(layers, chosen, strict=True):
        clear = draw.expected[f"margins.{layer}"] >= TIE
        assert clear.mean() > 0.9
        np.testing.assert_array_equal(found[clear], np.sort(draw.expected[f"experts.{layer}"], axis=-1)[clear])


@pytest.mark.parametrize("ending", ["conv.conv.weight", "expert_bias", "q_layernorm.weight"])
def test_control_reversed_tensors_move_the_logits_far_beyond_the_tolerance(tmp_path, ending):
    """Tap order, which expert a bias belongs to, which channel a norm scales."""
    torch = oracle().torch
    torch.manual_seed(0)
    model = oracle().random_model(oracle().moe())
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, model.config.vocab_size, (2, 24))
    expected = oracle().observed(model, tokens)["logits"].numpy()
    draw = Draw(folder=tmp_path, tokens=mx.array(tokens.numpy().astype(np.int32)), expected={})
    assert relative_error(load(draw)(draw.tokens), expected) < TOLERANCE
    path = tmp_path / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    for name in [name for name in tensors if name.endswith(ending)]:
        tensors[name] = mx.contiguous(tensors[name][..., ::-1])
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    assert relative_error(load(draw)(draw.tokens), expected) > BROKEN
