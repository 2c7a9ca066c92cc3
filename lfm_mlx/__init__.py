"""Liquid AI's LFM2 and LFM2.5 models on Apple Silicon, through MLX."""

from lfm_mlx.generate import Token, TokenStream, generate, stream
from lfm_mlx.load import load
from lfm_mlx.model import Model
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import SamplingParams

__all__ = ["Model", "SamplingParams", "Token", "TokenStream", "Tokenizer", "generate", "load", "stream"]

__version__ = "0.1.0"
