"""Calls or a form: one of both, and nothing else."""

from __future__ import annotations

import json

import pytest
from drawing import accepts_text
from tool_cases import WEATHER

from lfm_mlx.constrain import CallsOrForm, Choice, Constraint, GrammarTokenizer, JsonSchema, Regex, ToolCalls
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer

CALL = "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|>"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (JsonSchema(SCHEMA), json.dumps({"a": 5})),
        (Regex("[ab]+"), "abba"),
        (Choice(["yes", "no"]), "no"),
    ],
    ids=["schema", "regex", "choice"],
)
def test_an_answer_is_one_of_both(
    form: Constraint, text: str, tokenizer: Tokenizer, vocabulary: GrammarTokenizer
) -> None:
    either = CallsOrForm(ToolCalls([WEATHER], tool_choice="required"), form)
    assert accepts_text(either, vocabulary, tokenizer, CALL)
    assert accepts_text(either, vocabulary, tokenizer, text)
    assert accepts_text(either, vocabulary, tokenizer, f"<think>x</think>{text}")
    for wrong in ("", "hello", text + CALL, CALL + text, CALL.replace("city", "town")):
        assert not accepts_text(either, vocabulary, tokenizer, wrong)


def test_free_text_is_neither() -> None:
    with pytest.raises(OptionError, match="calls allows free text"):
        CallsOrForm(ToolCalls([WEATHER]), JsonSchema(SCHEMA))
