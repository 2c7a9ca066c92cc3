from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_checkpoints import chat_config, write_chat_checkpoint

from lfm_mlx import load
from lfm_mlx.errors import ContextLengthError, LfmError, OptionError, TemplateError
from lfm_mlx.generate.prompt import prompt_ids
from lfm_mlx.load import Loaded

WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
USER = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model without chat template."""
    return load(write_chat_checkpoint(tmp_path_factory.mktemp("plain"), has_template=False))


def rendered(loaded: Loaded, prompt: Any, **options: Any) -> str:
    """The text that the model gets to see."""
    return loaded.tokenizer.decode(prompt_ids(*loaded, prompt, **options))


def test_text_is_one_user_message(chat: Loaded) -> None:
    expected = "<|startoftext|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(chat, "Hello") == expected
    assert rendered(chat, [USER]) == expected
    assert rendered(chat, "Hello!") != expected


def test_a_system_message_stands_in_front(chat: Loaded) -> None:
    expected = "<|startoftext|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert rendered(chat, "Hello", system="Be brief.").startswith(expected)
    assert rendered(chat, [USER], system="Be brief.") == rendered(chat, "Hello", system="Be brief.")
    assert not rendered(chat, "Hello").startswith(expected)


def test_messages_of_the_caller_stay_as_they_are(chat: Loaded) -> None:
    messages = [USER]
    prompt_ids(*chat, messages, system="Be brief.")
    assert messages == [USER]


def test_tools_and_variables_reach_the_template(chat: Loaded) -> None:
    assert '"name": "get_weather"' in rendered(chat, "Hello", tools=[WEATHER])
    assert "Hello!" in rendered(chat, "Hello", template_variables={"shout": True})
    assert "get_weather" not in rendered(chat, "Hello")
    assert "Hello!" not in rendered(chat, "Hello", template_variables={"shout": False})


def test_raw_text_and_text_without_a_template_are_taken_as_they_are(chat: Loaded, plain: Loaded) -> None:
    assert rendered(chat, "Hello", raw=True) == "<|startoftext|>Hello"
    assert rendered(plain, "Hello") == "<|startoftext|>Hello"
    assert rendered(plain, "Hello", raw=True) == "<|startoftext|>Hello"


def test_ids_are_taken_as_they_are(chat: Loaded) -> None:
    assert prompt_ids(*chat, [5, 6, 319]) == [5, 6, 319]
    assert prompt_ids(*chat, (5, 6)) == [5, 6]
    assert prompt_ids(*chat, [5, 6], raw=True) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ("", {"system": "Be brief."}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([], {"system": "Be brief."}, "prompt is empty"),
        ([320], {}, "token id 320, expected 0 to 319"),
        ([5, -1], {}, "token id -1, expected 0 to 319"),
        (None, {}, "prompt is a NoneType, expected text, a list of ids or a list of messages"),
        (7, {}, "prompt is a int, expected text"),
        (USER, {}, "prompt is a dict, expected text"),
        (b"Hello", {}, "prompt is a bytes, expected text"),
        ("Hello", {"raw": True, "system": "Be brief."}, "system was given with a prompt that takes no template"),
        ("Hello", {"raw": True, "tools": [WEATHER]}, "tools was given with"),
        ("Hello", {"raw": True, "template_variables": {"shout": True}}, "template_variables was given with"),
        ([5], {"system": "Be brief."}, "system was given with"),
        ([5], {"tools": [WEATHER]}, "tools was given with"),
        ([USER], {"raw": True}, "raw was given with messages"),
        ("a\ud800", {}, "lone surrogate"),
        ("a\ud800", {"raw": True}, "lone surrogate"),
    ],
)
def test_a_prompt_that_makes_no_sense_is_refused(
    chat: Loaded, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        prompt_ids(*chat, prompt, **options)


@pytest.mark.parametrize(
    "prompt", [[5, True], [USER, 5], ["Hello"], [{"content": "Hello"}], [{"role": "user", "content": object()}]]
)
def test_messages_that_cannot_be_rendered_are_refused(chat: Loaded, prompt: Any) -> None:
    with pytest.raises(TemplateError, match=r"messages\[\d\]"):
        prompt_ids(*chat, prompt)


@pytest.mark.parametrize(
    ("prompt", "options"), [([USER], {}), ("Hello", {"system": "Be brief."}), ("Hello", {"tools": [WEATHER]})]
)
def test_what_needs_a_template_is_refused_without_one(plain: Loaded, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(LfmError, match="no chat template"):
        prompt_ids(*plain, prompt, **options)


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path: Path) -> None:
    short = load(write_chat_checkpoint(tmp_path, chat_config(max_position_embeddings=16)))
    assert len(prompt_ids(*short, [5] * 15)) == 15
    with pytest.raises(ContextLengthError, match=r"prompt has 16 tokens, expected fewer than 16 .*; shorten it"):
        prompt_ids(*short, [5] * 16)
