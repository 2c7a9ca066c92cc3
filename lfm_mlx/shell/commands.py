"""What can be typed with a slash in front."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.chat import Chat, render_prompt
from lfm_mlx.chat.answer import reasoning_tokens
from lfm_mlx.errors import LfmError, OptionError
from lfm_mlx.shell.keyboard import Words
from lfm_mlx.shell.rendering import Rendering
from lfm_mlx.shell.tally import Tally
from lfm_mlx.terminal import format_bytes

SHOWN_MESSAGE = 200
"""Characters of each message that are shown when a conversation is taken up again."""

_COMMAND = re.compile(r"/([\w?-]*)(?:\s+(.*))?$", re.DOTALL)


class Commands:
    """Carries out commands on a chat.

    Args:
        chat: what they change.
        rendering: where they answer.
        tally: what /stats shows.
        say: sends a message, for /regen; returns whether it was answered.
    """

    def __init__(self, chat: Chat, rendering: Rendering, tally: Tally, say: Callable[[str], bool]) -> None:
        self._chat = chat
        self._rendering = rendering
        self._tally = tally
        self._say = say
        self._file: str | None = None

    def run(self, line: str) -> bool:
        """Carry out a line if it is a command; returns False for a message, such as one that begins with a path.

        Raises:
            EOFError: the program is to end.
            LfmError: it cannot be done; the text says why.
        """
        match = _COMMAND.match(line)
        if match is None:
            return False
        name, argument = match[1], (match[2] or "").strip()
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean /{close[0]}?" if close else "/help lists what there is"
            raise OptionError(f"unknown command /{name}; {hint} (a space in front makes it a message)")
        COMMANDS[name].run(self, argument)
        return True

    @staticmethod
    def words() -> Words:
        """What Tab completes behind each command."""
        return {name: command.words for name, command in COMMANDS.items()}

    def load(self, file: str) -> None:
        """Go on from a saved conversation, and show where it stood."""
        before = self._chat.messages
        self._chat.load(Path(file).expanduser())
        try:
            self._count_context()
        except LfmError:
            self._chat.messages = before
            raise
        self._file = file
        self._rendering.note(f"{file}: {len(self._chat.messages)} messages")
        for message in self._chat.messages[-2:]:
            self._rendering.note(f"  {message['role']}: {_brief(message.get('content'))}")

    def _help(self, argument: str) -> None:
        width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            self._rendering.note(f"/{f'{name} {command.usage}':<{width}}  {command.help}")
        self._rendering.note("Enter sends; Alt+Enter, or a backslash at the end, starts a new line; Tab completes")
        self._rendering.note("Ctrl-C stops an answer or clears the line; Ctrl-D leaves")

    def _reset(self, argument: str) -> None:
        self._chat.reset()
        self._rendering.note("a new conversation")

    def _system(self, argument: str) -> None:
        if argument:
            set_system(self._chat, None if argument == "-" else argument)
        first = self._chat.messages[0] if self._chat.messages else {}
        has_system = first.get("role") == "system"
        self._rendering.note(f"system message: {first['content']}" if has_system else "no system message")

    def _save(self, argument: str) -> None:
        file = argument or self._file
        if not file:
            raise OptionError("/save without a file name, expected /save FILE")
        self._chat.save(Path(file).expanduser())
        self._file = file
        self._rendering.note(f"{file}: {len(self._chat.messages)} messages saved")

    def _load(self, argument: str) -> None:
        if not argument:
            raise OptionError("/load without a file name, expected /load FILE")
        self.load(argument)

    def _tools(self, argument: str) -> None:
        for one in self._chat.tools:
            function = one["function"]
            names = ", ".join(function.get("parameters", {}).get("properties", {}))
            self._rendering.note(f"{function['name']}({names})  {function.get('description', '')}".rstrip())
        if not self._chat.tools:
            self._rendering.note("no tools; start with --tools FILE.py to offer that file's functions")

    def _think(self, argument: str) -> None:
        if argument == "fold":
            self._rendering.is_folded = True
        elif argument == "show":
            self._rendering.unfold()
        elif argument in ("on", "off") or argument.isdecimal():
            if reasoning_tokens(self._chat.tokenizer) is None:
                raise OptionError(
                    "this model's vocabulary has no <think> and </think>; there is nothing to turn on or off"
                )
            wanted = None if argument == "on" else 0 if argument == "off" else int(argument)
            self._chat.options = replace(self._chat.options, thinking_budget=wanted)
        elif argument:
            raise OptionError(f"/think {argument}, expected on, off, fold, show, or the most tokens of reasoning")
        budget = self._chat.options.thinking_budget
        limit = "without limit" if budget is None else "off" if budget == 0 else f"at most {budget:,} tokens"
        self._rendering.note(f"reasoning: {limit}, {'folded' if self._rendering.is_folded else 'shown'}")

    def _regen(self, argument: str) -> None:
        before = list(self._chat.messages)
        content = self._chat.undo()
        if content is None:
            raise OptionError("there is no message to answer anew, expected one; say something first")
        if not self._say(content):
            self._chat.messages = before

    def _stats(self, argument: str) -> None:
        lines = self._tally.lines() if self._tally.num_turns else ["no turn yet"]
        lines.append(f"context: {self._count_context():,} of {self._chat.model.max_context:,} tokens")
        in_use, peak = format_bytes(mx.get_active_memory()), format_bytes(mx.get_peak_memory())
        lines.append(f"memory: {in_use} in use, {peak} at most")
        for line in lines:
            self._rendering.note(line)

    def _quit(self, argument: str) -> None:
        raise EOFError

    def _count_context(self) -> int:
        if not self._chat.messages:
            return 0
        options: dict[str, Any] = {"tools": self._chat.tools, "add_generation_prompt": False}
        return len(render_prompt(self._chat.tokenizer, self._chat.messages, **options).ids)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One line of /help, and what carries it out; `words` are what Tab completes behind it."""

    run: Callable[[Commands, str], None]
    help: str
    usage: str = ""
    words: Sequence[str] | None = ()


COMMANDS = {
    "help": Command(run=Commands._help, help="this list"),
    "reset": Command(run=Commands._reset, help="forget the conversation, keep the system message"),
    "system": Command(run=Commands._system, usage="[TEXT]", help="show or set the system message; - takes it away"),
    "save": Command(run=Commands._save, usage="FILE", words=None, help="write the conversation to a file"),
    "load": Command(run=Commands._load, usage="FILE", words=None, help="go on from a saved conversation"),
    "tools": Command(run=Commands._tools, help="list the tools that the model may call"),
    "think": Command(
        run=Commands._think,
        usage="[on|off|N|fold|show]",
        words=("on", "off", "fold", "show"),
        help="reasoning: as it likes, none, at most N tokens; as one line, or its text",
    ),
    "regen": Command(run=Commands._regen, help="write the last answer anew"),
    "stats": Command(run=Commands._stats, help="tokens, speed, context and memory"),
    "quit": Command(run=Commands._quit, help="leave, as Ctrl-D does"),
}


def set_system(chat: Chat, content: str | None) -> None:
    """Give a conversation another system message; None takes it away."""
    has_system = bool(chat.messages) and chat.messages[0]["role"] == "system"
    rest = chat.messages[1:] if has_system else chat.messages
    chat.messages = [*([{"role": "system", "content": content}] if content is not None else []), *rest]


def _brief(content: object) -> str:
    text = " ".join(str(content or "").split())
    return text if len(text) <= SHOWN_MESSAGE else f"{text[:SHOWN_MESSAGE]} ..."
