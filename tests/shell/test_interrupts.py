"""Ctrl-C at the keyboard and in a turn."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from chat_checkpoints import write_chat_checkpoint

from lfm_mlx import Chat, load
from lfm_mlx.shell import Interrupts, Rendering, Shell, make_console


@pytest.mark.parametrize("is_in_turn", [False, True])
@pytest.mark.parametrize(("ends", "code", "num_read"), [(False, 0, 2), (True, 130, 1)])
def test_ctrl_c_ends_a_conversation_only_where_it_is_to(
    is_in_turn: bool, ends: bool, code: int, num_read: int, tmp_path: Path
) -> None:
    console, interrupts = make_console(is_styled=False), Interrupts()
    chat = Chat(*load(write_chat_checkpoint(tmp_path)))
    shell = Shell(chat, Rendering(console, console, count_tokens=len), interrupts)
    read: list[str] = []

    def keyboard() -> str:
        read.append("")
        if len(read) > 1:
            raise EOFError
        if not is_in_turn:
            raise KeyboardInterrupt
        with interrupts.cancelling(lambda: None):  # As a turn does.
            signal.raise_signal(signal.SIGINT)
        return ""

    assert shell.run(keyboard, ends_at_interrupt=ends) == code
    assert len(read) == num_read
