from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_checkpoints import write_chat_checkpoint

from lfm_mlx import Chat, load
from lfm_mlx.errors import OptionError
from lfm_mlx.shell import make_console
from lfm_mlx.shell.commands import Commands, set_system
from lfm_mlx.shell.rendering import Rendering
from lfm_mlx.shell.tally import Tally


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(write_chat_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def chat(loaded: Any) -> Chat:
    return Chat(*loaded, max_tokens=4)


def commands(chat: Chat, said: list[str] | None = None, *, is_answered: bool = True) -> Commands:
    """The commands of a chat; what /regen sends is put into `said`."""
    console = make_console(is_styled=False)

    def say(content: str) -> bool:
        if said is not None:
            said.append(content)
        return is_answered

    return Commands(chat, Rendering(console, console, count_tokens=len), Tally(), say)


def test_the_system_message_is_set_shown_and_taken_away(chat: Chat, capsys: pytest.CaptureFixture[str]) -> None:
    chat.send("Hello")
    run = commands(chat).run
    run("/system Be\nbrief.")
    assert chat.messages[0] == {"role": "system", "content": "Be\nbrief."}
    run("/system Be long.")
    run("/system")
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    run("/system -")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert capsys.readouterr().out.splitlines()[-2:] == ["system message: Be long.", "no system message"]
    set_system(chat, "Again")
    assert len(chat.messages) == 3


def test_regen_sends_the_user_s_own_last_words_and_a_failure_keeps_the_answer(chat: Chat) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
    ]
    said: list[str] = []
    chat.messages = list(messages)
    commands(chat, said).run("/regen")
    assert (said, chat.messages) == (["Hello"], [])
    chat.messages = list(messages)
    commands(chat, is_answered=False).run("/regen")
    assert chat.messages == messages


def test_a_conversation_that_cannot_be_rendered_is_not_loaded(chat: Chat, tmp_path: Path) -> None:
    chat.messages = [{"role": "nobody", "content": 5}]
    chat.save(tmp_path / "bad.json")
    chat.messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(Exception, match="nobody"):
        commands(chat).run(f"/load {tmp_path / 'bad.json'}")
    assert chat.messages == [{"role": "user", "content": "Hello"}]


def test_reasoning_is_not_turned_off_where_there_is_none(chat: Chat) -> None:
    run = commands(chat).run
    before = chat.options
    with pytest.raises(OptionError, match="has no <think>"):
        run("/think off")
    with pytest.raises(OptionError, match="expected on, off, fold"):
        run("/think -3")
    assert chat.options == before
    with pytest.raises(EOFError):
        run("/quit")
