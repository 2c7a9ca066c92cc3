"""What the layers remember between calls."""

from lfm_mlx.cache.conv_state import ConvState
from lfm_mlx.cache.kv_cache import KVCache
from lfm_mlx.cache.span import Span
from lfm_mlx.cache.state import LayerState, Snapshot, State

__all__ = ["ConvState", "KVCache", "LayerState", "Snapshot", "Span", "State"]
