"""The one table of tensor names: Hugging Face's spelling and ours, which is mlx-lm's.

On disk an MLX checkpoint has mlx-lm's names. A Hugging Face checkpoint differs in three ways: dense feed-forward
matrices of the MoE models are called w1, w3, w2; experts are stored one by one (or, in transformers 5's memory layout,
with gate and up in one tensor); convolution taps are ``(D, 1, W)`` instead of ``(D, W, 1)``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lfm_mlx.config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.embedding_norm.weight"
HEAD = "lm_head.weight"

_HF_MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_EXPERT = re.compile(r"(model\.layers\.\d+\.feed_forward)\.experts\.(\d{1,9})\.(w1|w2|w3)\.weight")
_DENSE = re.compile(r"(model\.layers\.\d+\.feed_forward)\.(w1|w2|w3)\.weight")
_FUSED = re.compile(r"(model\.layers\.\d+\.feed_forward)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where one tensor of a Hugging Face checkpoint goes in ours.

    Args:
        target: our name.
        expert: the expert's index when the tensor is one slice of a stacked `target`; None when it is the whole.
        rows: which half of the tensor's second-to-last axis is meant (0 gate, 1 up) in a fused ``gate_up_proj``.
        is_taps: whether ``(D, 1, W)`` has to become ``(D, W, 1)``.
    """

    target: str
    expert: int | None = None
    rows: int | None = None
    is_taps: bool = False


def parts_of(name: str, config: ModelConfig) -> tuple[Part, ...]:
    """What a tensor called `name` (either spelling) contributes to our checkpoint; empty if it is to be dropped."""
    if name == HEAD and config.tie_embeddings:
        return ()
    if match := _EXPERT.fullmatch(name):
        layer, expert, matrix = match.groups()
        return (Part(target=f"{layer}.switch_mlp.{_HF_MATRICES[matrix]}.weight", expert=int(expert)),)
    if match := _FUSED.fullmatch(name):
        layer, matrix = match.groups()
        if matrix == "down_proj":
            return (Part(target=f"{layer}.switch_mlp.down_proj.weight"),)
        return tuple(
            Part(target=f"{layer}.switch_mlp.{half}.weight", rows=i) for i, half in enumerate(("gate_proj", "up_proj"))
        )
    if (match := _DENSE.fullmatch(name)) and config.model_type == "lfm2_moe":
        layer, matrix = match.groups()
        return (Part(target=f"{layer}.{_HF_MATRICES[matrix]}.weight"),)
    return (Part(target=name, is_taps=name.endswith(".conv.conv.weight")),)


def dense_matrices(config: ModelConfig) -> tuple[str, str, str]:
    """Names of the gate, up and down matrices of a dense feed-forward layer in our checkpoint."""
    return ("gate_proj", "up_proj", "down_proj") if config.model_type == "lfm2_moe" else ("w1", "w3", "w2")


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, or None for embedding, final norm and head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of an unquantised checkpoint of ours with its shape, in the order of the forward pass."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensors(config, layer).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The tensors of one layer with their shapes, named relative to ``model.layers.N.``"""
    size = config.hidden_size
    operator = _attention_tensors(config) if config.layer_types[layer] == "full_attention" else _conv_tensors(config)
    feed_forward = _moe_tensors(config) if config.has_experts(layer) else _mlp_tensors(config)
    return {"operator_norm.weight": (size,), **operator, "ffn_norm.weight": (size,), **feed_forward}


def _conv_tensors(config: ModelConfig) -> dict[str, Shape]:
    size = config.hidden_size
    shapes: dict[str, Shape] = {
        "conv.in_proj.weight": (3 * size, size),
        "conv.conv.weight": (size, config.conv_taps, 1),
        "conv.out_proj.weight": (size, size),
    }
    if config.conv_bias:
        shapes |= {"conv.in_proj.bias": (3 * size,), "conv.conv.bias": (size,), "conv.out_proj.bias": (size,)}
    return shapes


def _attention_tensors(config: ModelConfig) -> dict[str, Shape]:
    size, width = config.hidden_size, config.head_dim
    return {
        "self_attn.q_proj.weight": (config.num_heads * width, size),
        "self_attn.k_proj.weight": (config.num_kv_heads * width, size),
        "self_attn.v_proj.weight": (config.num_kv_heads * width, size),
        "self_attn.q_layernorm.weight": (width,),
        "self_attn.k_layernorm.weight": (width,),
        "self_attn.out_proj.weight": (size, config.num_heads * width),
    }


def _mlp_tensors(config: ModelConfig) -> dict[str, Shape]:
    gate, up, down = (f"feed_forward.{name}.weight" for name in dense_matrices(config))
    wide, narrow = (config.ffn_size, config.hidden_size), (config.hidden_size, config.ffn_size)
    return {gate: wide, up: wide, down: narrow}


def _moe_tensors(config: ModelConfig) -> dict[str, Shape]:
    count, size, width = config.num_experts, config.hidden_size, config.expert_ffn_size
    shapes: dict[str, Shape] = {"feed_forward.gate.weight": (count, size)}
    if config.use_expert_bias:
        shapes["feed_forward.expert_bias"] = (count,)
    for name in ("gate_proj", "up_proj"):
        shapes[f"feed_forward.switch_mlp.{name}.weight"] = (count, width, size)
    shapes["feed_forward.switch_mlp.down_proj.weight"] = (count, size, width)
    return shapes


def is_matrix(name: str) -> bool:
    """Whether a tensor of ours is a matrix that may be stored quantised (norms, taps and biases never are)."""
    return name.endswith(".weight") and not name.endswith(("norm.weight", ".conv.conv.weight"))


def is_router(name: str) -> bool:
    """Whether a tensor of ours, or a module path, is an expert router."""
    return name.removesuffix(".weight").endswith("feed_forward.gate")
