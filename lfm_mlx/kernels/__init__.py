"""Functions that become one kernel launch."""

from lfm_mlx.kernels.compiling import COMPILE_VARIABLE, is_compiling
from lfm_mlx.kernels.elementwise import combine_experts, gated_conv, rank_experts, silu_multiply

__all__ = ["COMPILE_VARIABLE", "combine_experts", "gated_conv", "is_compiling", "rank_experts", "silu_multiply"]
