"""What a step has to move and to compute at least: bytes read from memory, and arithmetic."""

from __future__ import annotations

import math

from mlx.utils import tree_flatten

from lfm_mlx.cache import AttentionCache, State
from lfm_mlx.config import ModelConfig
from lfm_mlx.model import Model
from lfm_mlx.names import HEAD, expected_tensors, is_matrix

_EXPERTS = ("feed_forward.gate_up_proj", "feed_forward.down_proj")


def step_weight_bytes(model: Model, batch_size: int) -> float:
    """Bytes of weights that a decode step of `batch_size` rows touches.

    Of the experts, those that the rows are expected to choose if all are equally likely, each counted once; of an
    embedding that is not the head, the rows' own lines.
    """
    config = model.config
    total = 0.0
    for name, array in dict(tree_flatten(model.parameters())).items():
        share = 1.0
        if array.ndim == 3 and any(part in name for part in _EXPERTS):
            share = touched_share(config, batch_size)
        elif name.startswith("embed_tokens") and not config.tie_embeddings:
            share = min(1.0, batch_size / config.vocab_size)
        total += share * array.nbytes
    return total


def touched_share(config: ModelConfig, batch_size: int) -> float:
    """The expected share of a layer's experts that at least one of `batch_size` tokens chooses."""
    return float(1 - (1 - config.num_active_experts / config.num_experts) ** batch_size)


def kv_bytes_per_position(state: State) -> float:
    """Bytes of keys and values that one position of all rows of `state` takes, all layers together."""
    arrays = [array for layer in state.layers if isinstance(layer, AttentionCache) for array in layer.arrays]
    return sum(array.nbytes / array.shape[2] for array in arrays if array.shape[2])


def prefill_operations(config: ModelConfig, num_tokens: int) -> float:
    """Floating-point operations of a prompt of `num_tokens` tokens: matmuls, attention, and the head once."""
    per_token = 0.0
    for name, shape in expected_tensors(config).items():
        if is_matrix(name) and name != HEAD and "embed_tokens" not in name:
            share = config.num_active_experts / config.num_experts if ".switch_mlp." in name else 1.0
            per_token += 2 * share * math.prod(shape)
    attention = 2 * 2 * config.num_heads * config.head_dim * len(config.attention_layers)
    head = 2 * config.vocab_size * config.hidden_size
    return num_tokens * per_token + attention * num_tokens * (num_tokens + 1) / 2 + head
