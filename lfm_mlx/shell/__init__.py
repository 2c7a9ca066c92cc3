"""The terminal chat: a loop around `lfm_mlx.chat.Chat` that reads messages and shows what comes back."""

from lfm_mlx.shell.commands import Commands, set_system
from lfm_mlx.shell.interrupts import Interrupts
from lfm_mlx.shell.keyboard import make_keyboard
from lfm_mlx.shell.rendering import Rendering, call_text, has_styles, is_dumb, make_console
from lfm_mlx.shell.shell import Shell, answer_all, ask
from lfm_mlx.shell.tool_file import read_tools

__all__ = [
    "Commands",
    "Interrupts",
    "Rendering",
    "Shell",
    "answer_all",
    "ask",
    "call_text",
    "has_styles",
    "is_dumb",
    "make_console",
    "make_keyboard",
    "read_tools",
    "set_system",
]
