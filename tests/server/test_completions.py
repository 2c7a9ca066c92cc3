"""Text completions over HTTP, and log-probabilities of both interfaces."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from running_server import Running

TEXT = "The capital of France is"


def complete(served: Running, **fields: Any) -> dict[str, Any]:
    """One completion."""
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": 6, **fields}
    response = served.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_text_goes_on_without_a_template(served: Running) -> None:
    body = complete(served)
    ids = served.service.tokenizer.encode(TEXT)
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["usage"]["completion_tokens"] == 6
    assert body["choices"][0]["text"]
    assert complete(served, prompt=ids)["choices"][0]["text"] == body["choices"][0]["text"]
    assert complete(served, echo=True)["choices"][0]["text"] == TEXT + body["choices"][0]["text"]


def test_markers_are_text(served: Running) -> None:
    opening = served.service.tokenizer.token_id("<think>")
    text = complete(served, logit_bias={str(opening): 100}, max_tokens=3)["choices"][0]["text"]
    assert text == "<think>" * 3


def test_an_answer_goes_on_where_the_model_may_not_end_it(served: Running) -> None:
    ends = {str(token_id): 100 for token_id in served.service.tokenizer.stop_ids}
    assert complete(served, logit_bias=ends)["choices"][0]["finish_reason"] == "stop"
    assert complete(served, logit_bias=ends, ignore_eos=True)["usage"]["completion_tokens"] == 6
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "logit_bias": ends, "max_tokens": 6}
    chat = served.http.post("/v1/chat/completions", json={**body, "ignore_eos": True}).json()
    assert chat["usage"]["completion_tokens"] == 6
    answer = served.http.post(
        "/v1/responses", json={"input": "Hello", "logit_bias": ends, "max_output_tokens": 6, "ignore_eos": True}
    ).json()
    assert answer["usage"]["output_tokens"] == 6


def test_several_prompts_have_several_answers_each(served: Running) -> None:
    body = complete(served, prompt=[TEXT, "Hello"], n=2)
    texts = [choice["text"] for choice in body["choices"]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == complete(served)["choices"][0]["text"]
    assert texts[2] == texts[3] == complete(served, prompt="Hello")["choices"][0]["text"]
    lengths = [len(served.service.tokenizer.encode(text)) for text in (TEXT, "Hello")]
    assert body["usage"]["prompt_tokens"] == sum(lengths)


def test_a_stream_is_the_whole_text(served: Running) -> None:
    whole = complete(served, logprobs=2, max_tokens=4)["choices"][0]
    body = {"prompt": TEXT, "temperature": 0, "max_tokens": 4, "logprobs": 2, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "length"
    tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
    assert tokens == whole["logprobs"]["tokens"]
    offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
    assert offsets == whole["logprobs"]["text_offset"]


def test_logprobs_of_a_text_are_of_its_tokens(served: Running) -> None:
    choice = complete(served, logprobs=3, max_tokens=4)["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert len(found["token_logprobs"]) == len(found["top_logprobs"]) == 4
    for token, value, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        # Greedy: the token that came is the likeliest one.
        assert top[token] == value == max(top.values())
        assert sum(map(math.exp, top.values())) <= 1.001


def test_logprobs_of_a_chat_cover_what_is_shown(served: Running) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "max_tokens": 8}
    choice = served.chat("What is the capital of France?", **fields).json()["choices"][0]
    content = choice["logprobs"]["content"]
    text = b"".join(bytes(one["bytes"]) for one in content).decode()
    assert text == "<think>" + choice["message"]["reasoning"]
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, **fields}
    with served.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    streamed = [json.loads(line)["choices"][0]["logprobs"] for line in lines]
    tokens = [one["token"] for part in streamed if part for one in part["content"]]
    assert tokens == [one["token"] for one in content]
    assert served.chat(max_tokens=2).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [10**9]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_field_that_is_not_honoured_is_named(served: Running, fields: dict[str, Any], param: str) -> None:
    response = served.http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 2, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text
