"""The loop of the terminal chat: read, answer, show."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_mlx.chat import Chat, TurnDone
from lfm_mlx.errors import LfmError
from lfm_mlx.shell.commands import Commands
from lfm_mlx.shell.interrupts import Interrupts
from lfm_mlx.shell.keyboard import Keyboard
from lfm_mlx.shell.rendering import Rendering
from lfm_mlx.shell.tally import Tally
from lfm_mlx.terminal import INTERRUPTED


class Shell:
    """A conversation in a terminal.

    Args:
        chat: who answers.
        rendering: shows the answers.
        interrupts: what Ctrl-C does meanwhile.

    Attributes:
        commands: what can be typed with a slash in front.
    """

    def __init__(self, chat: Chat, rendering: Rendering, interrupts: Interrupts) -> None:
        self._chat = chat
        self._rendering = rendering
        self._interrupts = interrupts
        self._tally = Tally()
        self.commands = Commands(chat, rendering, self._tally, self.say)

    def run(self, keyboard: Keyboard, *, ends_at_interrupt: bool = False) -> int:
        """Read and answer until the user leaves.

        Args:
            keyboard: what is read.
            ends_at_interrupt: whether Ctrl-C, which ends an answer, ends the conversation too.

        Returns:
            The exit code.
        """
        while not (ends_at_interrupt and self._interrupts.is_interrupted):
            try:
                self._take(keyboard())
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if ends_at_interrupt:
                    break
                self._rendering.note("Ctrl-D or /quit leaves")
            except LfmError as error:
                self._rendering.complain(str(error))
        return INTERRUPTED

    def _take(self, line: str) -> None:
        if line.strip() and not self.commands.run(line):
            self.say(line.strip())

    def say(self, content: str) -> bool:
        """Send a message and show the turn; returns False if it failed, after a line that says why."""
        self._tally.begin()
        try:
            with self._interrupts.cancelling(self._chat.cancel):
                for event in self._chat.stream(content):
                    self._tally.note(event)
                    self._rendering.show(event)
        except (LfmError, MemoryError, RuntimeError) as error:  # MLX reports a full memory as a RuntimeError.
            self._rendering.complain(
                str(error).partition("\n")[0] or "out of memory; a shorter conversation needs less"
            )
            return False
        self._rendering.space()
        return True


def answer_all(chat: Chat, messages: Sequence[str], rendering: Rendering, interrupts: Interrupts) -> int:
    """Answer messages one after the other, with nobody at the keyboard; returns the exit code.

    Raises:
        LfmError: a turn cannot be written.
    """
    with interrupts.cancelling(chat.cancel):
        for message in messages:
            for event in chat.stream(message):
                rendering.show(event)
                if isinstance(event, TurnDone) and event.reply.finish_reason == "cancelled":
                    return INTERRUPTED
    return 0


def ask(question: str, rendering: Rendering, interrupts: Interrupts) -> bool:
    """Ask a question whose answer is yes or no; anything but y is no, and Ctrl-C ends the turn, too."""
    try:
        with interrupts.breaking():
            rendering.prompt(f"{question} [y/N] ")
            return input().strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        rendering.note("")
        return False
