"""Functions that become few kernel launches, or need little memory."""

from lfm_mlx.kernels.chunked_attention import SCORE_BYTES, attend_in_chunks
from lfm_mlx.kernels.compiling import COMPILE_VARIABLE, is_compiling
from lfm_mlx.kernels.elementwise import combine_experts, gated_conv, rank_experts, silu_multiply

__all__ = [
    "COMPILE_VARIABLE",
    "SCORE_BYTES",
    "attend_in_chunks",
    "combine_experts",
    "gated_conv",
    "is_compiling",
    "rank_experts",
    "silu_multiply",
]
