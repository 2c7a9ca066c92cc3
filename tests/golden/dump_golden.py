"""Write the golden checkpoints of this folder with transformers: ``python tests/golden/dump_golden.py``.

Each folder holds a tiny checkpoint as transformers saved it (config.json, model.safetensors) and expected.safetensors
with what transformers computes from it in float32 on the CPU:

- ``tokens`` (B, L) and ``logits`` (B, L, V);
- ``hidden.N`` (B, L, D) after layer N;
- ``experts.N`` and ``weights.N`` (B L, A), and ``margins.N`` (B L): the ranking score of the last chosen expert less
  that of the first one not chosen;
- ``greedy`` (B, 24): the greedy continuation, and ``greedy_margin`` (1): its smallest lead over the runner-up, relative
  to the largest logit.

Needs torch and transformers (made with torch 2.13 and transformers 5.23); the tests that read the files do not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
NUM_TOKENS = 17
NUM_GREEDY = 24
SMALLEST_MARGIN = 3e-4


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One checkpoint: its architecture, and what is done to config.json after saving."""

    config: Lfm2Config | Lfm2MoeConfig
    dtype: torch.dtype = torch.bfloat16
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def dense(**changes: Any) -> Lfm2Config:
    """A small dense architecture with the two-thirds rule on: 72 becomes 48, rounded up to 64."""
    values = {
        "vocab_size": 83,
        "hidden_size": 32,
        "intermediate_size": 72,
        "block_multiple_of": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "eos_token_id": 7,
    }
    return Lfm2Config(**{**values, **changes})


def moe(**changes: Any) -> Lfm2MoeConfig:
    """A small mixture of experts with the features of LFM2.5-8B-A1B."""
    values = {
        "vocab_size": 83,
        "hidden_size": 32,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6},
        "eos_token_id": 7,
    }
    return Lfm2MoeConfig(**{**values, **changes})


def with_old_keys(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json with the key names of the first LFM2 checkpoints only."""
    kept = (
        *("architectures", "model_type", "vocab_size", "num_hidden_layers", "num_key_value_heads", "conv_bias"),
        *("conv_L_cache", "block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim"),
        *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    )
    attention = [i for i, kind in enumerate(raw["layer_types"]) if kind == "full_attention"]
    return {key: raw[key] for key in kept} | {
        "block_dim": raw["hidden_size"],
        "block_ff_dim": raw["intermediate_size"],
        "block_norm_eps": raw["norm_eps"],
        "conv_dim": raw["hidden_size"],
        "conv_dim_out": raw["hidden_size"],
        "full_attn_idxs": attention,
        "num_heads": raw["num_attention_heads"],
        "rope_theta": raw["rope_parameters"]["rope_theta"],
        "tie_embedding": raw["tie_word_embeddings"],
        "torch_dtype": raw["dtype"],
    }


GOLDENS = {
    "moe": Golden(config=moe()),
    "moe_taps4_untied": Golden(
        config=moe(
            conv_L_cache=4,
            conv_bias=True,
            tie_word_embeddings=False,
            norm_topk_prob=False,
            routed_scaling_factor=1.7,
        )
    ),
    "moe_without_bias": Golden(
        config=moe(use_expert_bias=False, num_dense_layers=0, num_experts=5, num_experts_per_tok=2)
    ),
    "dense": Golden(config=dense()),
    "dense_without_rule": Golden(
        config=dense(block_auto_adjust_ff_dim=False, intermediate_size=40), dtype=torch.float32
    ),
    "dense_odd_sizes": Golden(
        config=dense(
            hidden_size=60,
            num_hidden_layers=3,
            layer_types=["full_attention", "conv", "full_attention"],
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=97,
            block_auto_adjust_ff_dim=False,
            vocab_size=89,
        )
    ),
    "dense_old_keys": Golden(
        config=dense(
            rope_parameters={"rope_type": "default", "rope_theta": 2e4}, norm_eps=1e-4, block_ffn_dim_multiplier=1.5
        ),
        rewrite=with_old_keys,
    ),
    "dense_head_dim": Golden(config=dense(head_dim=12)),
}


def random_model(config: Lfm2Config | Lfm2MoeConfig) -> PreTrainedModel:
    """A model of random weights, scaled so that every part changes the logits."""
    kind = Lfm2MoeForCausalLM if isinstance(config, Lfm2MoeConfig) else Lfm2ForCausalLM
    model = kind(config).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "conv.conv.weight" in name or name.endswith("bias"):
                weight.copy_(0.6 * torch.randn_like(weight))
            elif "embed_tokens" in name:
                weight.copy_(torch.randn_like(weight))
            else:
                weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    return model


def observed(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, hidden states and router choices of one forward pass."""
    seen: dict[str, torch.Tensor] = {}

    def after_layer(layer: int) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: Any) -> None:
            seen[f"hidden.{layer}"] = output[0] if isinstance(output, tuple) else output

        return hook

    def after_router(layer: int, bias: torch.Tensor | None) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: Any) -> None:
            router_logits, weights, experts = output
            ranked = router_logits.sigmoid() + (0 if bias is None else bias)
            top = ranked.sort(dim=-1, descending=True).values
            num_active = experts.shape[-1]
            seen[f"experts.{layer}"] = experts.to(torch.int32)
            seen[f"weights.{layer}"] = weights
            seen[f"margins.{layer}"] = top[:, num_active - 1] - top[:, num_active]

        return hook

    hooks = []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(after_layer(i)))
        if hasattr(layer.feed_forward, "gate"):
            bias = getattr(layer.feed_forward, "expert_bias", None)
            hooks.append(layer.feed_forward.gate.register_forward_hook(after_router(i, bias)))
    with torch.no_grad():
        seen["logits"] = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return seen


def greedy(model: PreTrainedModel, tokens: torch.Tensor, num_tokens: int) -> dict[str, torch.Tensor]:
    """The greedy continuation and how clearly it was chosen."""
    model.generation_config.eos_token_id = None
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)
    top = logits.topk(2, dim=-1).values
    margin = (top[..., 0] - top[..., 1]).min() / logits.abs().max()
    return {"greedy": out.sequences[:, tokens.shape[1] :].to(torch.int32), "greedy_margin": margin[None]}


def dump(name: str, golden: Golden) -> None:
    """Write one folder, with the first seed whose greedy continuation holds no near tie."""
    folder = HERE / name
    for seed in range(20):
        expected = attempt(folder, golden, seed)
        if float(expected["greedy_margin"]) > SMALLEST_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: every seed gives a tie in the greedy continuation")
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    if golden.rewrite is not None:
        path = folder / "config.json"
        raw = golden.rewrite(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{name}: seed {seed}, {size:,} bytes, greedy margin {float(expected['greedy_margin']):.2g}")


def attempt(folder: Path, golden: Golden, seed: int) -> dict[str, torch.Tensor]:
    """Save a random checkpoint and compute what is expected of it."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = random_model(golden.config).to(golden.dtype)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    stored = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, golden.config.vocab_size, (2, NUM_TOKENS))
    return observed(stored, tokens) | greedy(stored, tokens, NUM_GREEDY) | {"tokens": tokens.to(torch.int32)}


def main() -> None:
    """Write every folder."""
    for name, golden in GOLDENS.items():
        dump(name, golden)


if __name__ == "__main__":
    main()
