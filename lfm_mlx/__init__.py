"""Liquid AI's LFM2 and LFM2.5 models on Apple Silicon, through MLX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lfm_mlx.engine import Engine
from lfm_mlx.generate import Token, TokenStream, generate, stream
from lfm_mlx.load import load
from lfm_mlx.model import Model
from lfm_mlx.parsing import ParsedOutput, parse_output
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import SamplingParams

if TYPE_CHECKING:
    from lfm_mlx.chat import Chat, Reply, tool

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

_FROM_CHAT = ("Chat", "Reply", "tool")
"""Imported on first use: grammars and asyncio would double the time that `generate` takes to start."""


def __getattr__(name: str) -> Any:
    if name in _FROM_CHAT:
        return getattr(import_module("lfm_mlx.chat"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
