"""Text to token ids and back: the tokenizer, its streaming detokenizer and the chat template."""

from lfm_mlx.tokenizer.detokenizer import StreamingDetokenizer
from lfm_mlx.tokenizer.template import ChatTemplate, opens_reasoning
from lfm_mlx.tokenizer.tokenizer import Tokenizer, load_tokenizer
from lfm_mlx.tokenizer.tool_support import tool_problems

__all__ = ["ChatTemplate", "StreamingDetokenizer", "Tokenizer", "load_tokenizer", "opens_reasoning", "tool_problems"]
