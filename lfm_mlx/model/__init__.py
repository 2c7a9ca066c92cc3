"""The module tree: arithmetic only."""

from lfm_mlx.model.attention import Attention
from lfm_mlx.model.block import Block
from lfm_mlx.model.lfm2 import Model
from lfm_mlx.model.linear import (
    AnyExpertLinear,
    AnyLinear,
    Embedding,
    ExpertLinear,
    Linear,
    QuantizedExpertLinear,
    QuantizedLinear,
    SplitExpertLinear,
    SplitLinear,
)
from lfm_mlx.model.mlp import MLP
from lfm_mlx.model.moe import MoE
from lfm_mlx.model.norm import Norm
from lfm_mlx.model.passage import Passage
from lfm_mlx.model.short_conv import ShortConv

__all__ = [
    "MLP",
    "AnyExpertLinear",
    "AnyLinear",
    "Attention",
    "Block",
    "Embedding",
    "ExpertLinear",
    "Linear",
    "MoE",
    "Model",
    "Norm",
    "Passage",
    "QuantizedExpertLinear",
    "QuantizedLinear",
    "ShortConv",
    "SplitExpertLinear",
    "SplitLinear",
]
