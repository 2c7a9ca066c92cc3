"""What the layers remember between calls."""

from lfm_mlx.cache.attention_cache import GROWTH_TOKENS, AttentionCache
from lfm_mlx.cache.conv_state import ConvState
from lfm_mlx.cache.disk import DiskStore
from lfm_mlx.cache.fingerprint import checkpoint_fingerprint, content_fingerprint
from lfm_mlx.cache.kv_cache import KVCache
from lfm_mlx.cache.prefix import BLOCK_TOKENS, Company, PrefixCache
from lfm_mlx.cache.prefix_block import Block
from lfm_mlx.cache.prefix_spill import Reading
from lfm_mlx.cache.quantized_kv_cache import KV_BITS, QuantizedKVCache, kv_group_size
from lfm_mlx.cache.span import Span
from lfm_mlx.cache.state import LayerState, Mark, Snapshot, State
from lfm_mlx.cache.transcript import Transcript

__all__ = [
    "BLOCK_TOKENS",
    "GROWTH_TOKENS",
    "KV_BITS",
    "AttentionCache",
    "Block",
    "Company",
    "ConvState",
    "DiskStore",
    "KVCache",
    "LayerState",
    "Mark",
    "PrefixCache",
    "QuantizedKVCache",
    "Reading",
    "Snapshot",
    "Span",
    "State",
    "Transcript",
    "checkpoint_fingerprint",
    "content_fingerprint",
    "kv_group_size",
]
