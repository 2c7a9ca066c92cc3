"""Messages in, typed events out; `python -m lfm_mlx.chat` in the terminal."""

from lfm_mlx.chat.answer import Answer, AnswerOptions
from lfm_mlx.chat.conversation import Chat
from lfm_mlx.chat.functions import FunctionTool, as_tools, tool
from lfm_mlx.chat.messages import RenderedPrompt, render_prompt
from lfm_mlx.chat.reply import ChatEvent, Reply, ToolResult, TurnDone, Usage

__all__ = [
    "Answer",
    "AnswerOptions",
    "Chat",
    "ChatEvent",
    "FunctionTool",
    "RenderedPrompt",
    "Reply",
    "ToolResult",
    "TurnDone",
    "Usage",
    "as_tools",
    "render_prompt",
    "tool",
]
