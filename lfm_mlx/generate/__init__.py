"""One prompt in, text out; `python -m lfm_mlx.generate` in the terminal."""

from lfm_mlx.generate.generation import Statistics, Token, TokenStream, check_options, generate, stream
from lfm_mlx.generate.prompt import Prompt

__all__ = ["Prompt", "Statistics", "Token", "TokenStream", "check_options", "generate", "stream"]
