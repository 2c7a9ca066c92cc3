"""From fields to prompts: whatever is asked is either asked or refused with an error of ours."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from running_server import WEATHER_TOOL, Running

from lfm_mlx.constrain import Regex
from lfm_mlx.errors import LfmError
from lfm_mlx.server import anthropic_fields, response_fields
from lfm_mlx.server.asking import Ask, prepare
from lfm_mlx.server.chat_completions import CHAT, read_ask
from lfm_mlx.server.field_types import Fields
from lfm_mlx.server.request_body import PARSE_IN_THREAD_BYTES
from lfm_mlx.server.token_endpoints import TOKENIZE
from lfm_mlx.types import SamplingParams

JUNK = [True, 5, -1, 1.5, 10**30, 1e308, "", "x", [], [[]], ["x"], [{}], {}, {"x": 1}, {"type": 5}, {"type": "x"}]
USER = [{"role": "user", "content": "x"}]

INTERFACES = {
    "chat": (CHAT, read_ask, {"messages": USER, "tools": [WEATHER_TOOL]}),
    "responses": (response_fields.RESPONSES, response_fields.read_question, {"input": "x"}),
    "messages": (anthropic_fields.MESSAGES, anthropic_fields.read_question, {"messages": USER, "max_tokens": 5}),
}


@pytest.mark.parametrize("interface", INTERFACES)
def test_any_value_in_any_field_is_taken_or_refused(served: Running, interface: str) -> None:
    fields, read, good = INTERFACES[interface]
    num_refused = 0
    for name, value in itertools.product(fields.fields, JUNK):
        try:
            prepare(served.service.model, served.service.tokenizer, read(fields.read({**good, name: value}, "")))
        except LfmError:
            num_refused += 1
    assert num_refused > 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": USER, "max_tokens": 3, "guided_regex": "a"}),
        ("completions", {"prompt": ["x", "y"], "max_tokens": 3, "guided_regex": "a"}),
        ("responses", {"input": "x", "max_output_tokens": 16, "text": {"format": {"type": "regex", "regex": "a"}}}),
    ],
)
def test_a_grammar_is_compiled_once_and_beside_the_event_loop(
    served: Running, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    in_loop: list[bool] = []

    def compile_here(pattern: str) -> Regex:
        in_loop.append(asyncio._get_running_loop() is not None)
        return Regex(pattern)

    monkeypatch.setattr("lfm_mlx.server.generation_fields.Regex", compile_here)
    response = served.http.post(f"/v1/{path}", json=fields)
    assert response.status_code == 200, response.text
    assert in_loop == [False]


@pytest.mark.parametrize(("size", "is_in_loop"), [(1000, True), (PARSE_IN_THREAD_BYTES, False)])
def test_large_bodies_are_read_beside_the_event_loop(
    served: Running, monkeypatch: pytest.MonkeyPatch, size: int, is_in_loop: bool
) -> None:
    in_loop: list[bool] = []

    def read_here(value: object, path: str) -> Any:
        in_loop.append(asyncio._get_running_loop() is not None)
        return Fields.read(TOKENIZE, value, path)

    monkeypatch.setattr(TOKENIZE, "read", read_here)
    assert served.http.post("/tokenize", json={"prompt": "x " * (size // 2)}).status_code in (200, 400)
    assert in_loop == [is_in_loop]


def test_a_seed_gives_each_answer_the_next_one(served: Running) -> None:
    def seeds(**sampling: Any) -> list[int | None]:
        ask = Ask(messages=USER, sampling=sampling, num_answers=3)
        prepared = prepare(served.service.model, served.service.tokenizer, ask)
        return [options.sampling.seed for options in prepared.options if options.sampling is not None]

    assert seeds(seed=2**64 - 2) == [2**64 - 2, 2**64 - 1, 0]
    assert seeds() == [None] * 3


def test_what_is_not_asked_for_is_the_model_cards(served: Running) -> None:
    model = served.service.model
    prepared = prepare(model, served.service.tokenizer, Ask(messages=USER, sampling={"top_k": 3}))
    assert prepared.sampling == SamplingParams(
        temperature=model.sampling.temperature,
        top_k=3,
        min_p=model.sampling.min_p,
        repetition_penalty=model.sampling.repetition_penalty,
    )


@pytest.mark.parametrize("interface", ["chat", "responses"])
def test_loops_are_ended_unless_a_request_lets_them_be(served: Running, interface: str) -> None:
    def is_guarding(**given: Any) -> bool:
        fields, read, good = INTERFACES[interface]
        ask = read(fields.read({**good, **given}, ""))
        (options,) = prepare(served.service.model, served.service.tokenizer, ask).options
        return options.guards_loops

    assert is_guarding()
    assert is_guarding(loop_guard=True)
    assert not is_guarding(loop_guard=False)


@pytest.mark.parametrize("name", ["tools", "add_generation_prompt", "messages", "tokenizer", "self", "enable_thinknig"])
def test_variables_of_the_template_that_are_none_are_named(served: Running, name: str) -> None:
    body = {"messages": USER, "chat_template_kwargs": {name: 1}}
    for path in ("/v1/chat/completions", "/tokenize"):
        response = served.http.post(path, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"chat_template_kwargs.{name}"
