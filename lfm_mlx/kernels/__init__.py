"""Functions that become few kernel launches, or need little memory."""

from lfm_mlx.kernels import choice, compiling, quantized_products
from lfm_mlx.kernels.add_norm import ADD_NORM, add_norm
from lfm_mlx.kernels.choice import KERNEL_NAMES, KERNELS_VARIABLE, MAX_TOKENS, Case, FusedKernel, has_metal
from lfm_mlx.kernels.chunked_attention import SCORE_BYTES, attend_in_chunks
from lfm_mlx.kernels.combine_norm import COMBINE_NORM, combine, combine_norm
from lfm_mlx.kernels.compiling import COMPILE_VARIABLE, is_compiling
from lfm_mlx.kernels.cpu_attention import attend_on_cpu, is_for_cpu
from lfm_mlx.kernels.elementwise import combine_experts, gated_conv, rank_experts, silu_multiply, weigh_experts
from lfm_mlx.kernels.expert_router import ROUTER, Routing, route, weights_of
from lfm_mlx.kernels.metal_kernel import MetalKernel
from lfm_mlx.kernels.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope
from lfm_mlx.kernels.quantized_products import gather_quantized_matmul, quantized_matmul
from lfm_mlx.kernels.row_blocks import in_blocks, without_blocks
from lfm_mlx.kernels.verdict import Verdict, tried_again

FUSED_KERNELS = (ADD_NORM, COMBINE_NORM, QK_NORM_ROPE, ROUTER)
"""Every fused kernel, beside the stock operations that it replaces."""

__all__ = [
    "ADD_NORM",
    "COMBINE_NORM",
    "COMPILE_VARIABLE",
    "FUSED_KERNELS",
    "KERNELS_VARIABLE",
    "KERNEL_NAMES",
    "MAX_TOKENS",
    "QK_NORM_ROPE",
    "ROUTER",
    "SCORE_BYTES",
    "Case",
    "FusedKernel",
    "MetalKernel",
    "Routing",
    "Verdict",
    "add_norm",
    "attend_in_chunks",
    "attend_on_cpu",
    "choice",
    "combine",
    "combine_experts",
    "combine_norm",
    "compiling",
    "gated_conv",
    "gather_quantized_matmul",
    "has_metal",
    "in_blocks",
    "is_compiling",
    "is_for_cpu",
    "qk_norm_rope",
    "quantized_matmul",
    "quantized_products",
    "rank_experts",
    "route",
    "silu_multiply",
    "tried_again",
    "weigh_experts",
    "weights_of",
    "without_blocks",
]
