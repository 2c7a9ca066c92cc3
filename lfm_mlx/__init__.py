"""Liquid AI's LFM2 and LFM2.5 models on Apple Silicon, through MLX."""

from lfm_mlx.chat import Chat, Reply, tool
from lfm_mlx.engine import Engine
from lfm_mlx.generate import Token, TokenStream, generate, stream
from lfm_mlx.load import load
from lfm_mlx.model import Model
from lfm_mlx.parsing import ParsedOutput, parse_output
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import SamplingParams

__all__ = [
    "Chat",
    "Engine",
    "Model",
    "ParsedOutput",
    "Reply",
    "SamplingParams",
    "Token",
    "TokenStream",
    "Tokenizer",
    "generate",
    "load",
    "parse_output",
    "stream",
    "tool",
]

__version__ = "0.1.0"
