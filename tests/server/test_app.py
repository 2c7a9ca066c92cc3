"""The endpoints around the models' answers, and who may call."""

from __future__ import annotations

import gzip
import json
from typing import Any

import jsonschema
import pytest
from running_server import Running, new_service, running, wait_until

from lfm_mlx.server.http_errors import Dialect

QUESTION = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}


def test_tokens_go_there_and_back(served: Running) -> None:
    text = "What is the capital of France?"
    body = served.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 4096
    plain = served.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": plain}).json() == {"prompt": text}


def test_the_tokens_of_messages_are_those_of_their_prompt(served: Running) -> None:
    messages = {"messages": QUESTION["messages"]}
    tokens = served.http.post("/tokenize", json=messages).json()["tokens"]
    assert len(tokens) == served.chat("Say hello.").json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**9]}, None),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", [], None),
    ],
)
def test_what_is_no_text_or_no_token_is_refused(served: Running, path: str, body: Any, param: str | None) -> None:
    response = served.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_metrics_count_what_was_asked(served: Running) -> None:
    def value(name: str) -> float:
        lines = served.http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(name)]
        return sum(float(line.rpartition(" ")[2]) for line in found)

    names = ("lfm_mlx:generation_tokens_total", "lfm_mlx:prompt_tokens_total", "lfm_mlx:request_success_total")
    before = [value(name) for name in names]
    usage = served.chat().json()["usage"]
    grown = [value(name) - old for name, old in zip(names, before, strict=True)]
    assert grown == [usage["completion_tokens"], usage["prompt_tokens"], 1]
    assert value("lfm_mlx:num_requests_running") == 0
    assert value("lfm_mlx:time_to_first_token_seconds_count") > 0


def test_metrics_have_the_time_between_any_two_tokens(served: Running) -> None:
    def counts() -> tuple[float, ...]:
        values = dict(line.rsplit(" ", 1) for line in served.http.get("/metrics").text.splitlines() if line[0] != "#")
        names = ("inter_token_latency_seconds", "request_time_per_output_token_seconds")
        return tuple(float(values[f'lfm_mlx:{name}_count{{model_name="tiny"}}']) for name in names)

    before = counts()
    num_tokens = served.chat(max_tokens=20).json()["usage"]["completion_tokens"]
    tokens, answers = (now - old for now, old in zip(counts(), before, strict=True))
    assert answers == 1
    assert 1 < tokens < num_tokens


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405)],
)
def test_unknown_paths_and_methods_get_an_error_of_the_usual_shape(
    served: Running, method: str, path: str, status: int
) -> None:
    response = served.http.request(method, path)
    assert response.status_code == status
    assert path in response.json()["error"]["message"]


def test_a_request_id_is_echoed_and_a_bad_one_replaced(served: Running) -> None:
    def echoed(given: str) -> str:
        return served.http.get("/health", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("abc-123") == "abc-123"
    assert echoed("a b\tc").startswith("req_")


def test_the_description_is_that_of_the_checks(served: Running) -> None:
    document = served.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    chat = document["paths"]["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(QUESTION, schema)
    for wrong in ({}, {**QUESTION, "temperature": "hot"}, {**QUESTION, "nothing": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.fixture(scope="module")
def guarded() -> Any:
    """A server with keys, which lets pages of one site call."""
    with running(new_service(api_keys=("sesame", "open"), cors_origins=("https://app.example",))) as one:
        yield one


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer sesame2"}, 401),
        ({"authorization": "Basic sesame"}, 401),
        ({"authorization": "Bearer sesame"}, 200),
        ({"x-api-key": "open"}, 200),
    ],
)
def test_only_a_key_opens(guarded: Running, headers: dict[str, str], status: int) -> None:
    for response in (
        guarded.http.post("/v1/chat/completions", json=QUESTION, headers=headers),
        guarded.http.get("/metrics", headers=headers),
    ):
        assert response.status_code == status
    assert guarded.http.get("/health/live").status_code == 200


@pytest.mark.parametrize(("path", "dialect"), [("/v1/responses", "openai"), ("/v1/messages", "anthropic")])
def test_refusals_have_the_shape_of_the_interface(guarded: Running, path: str, dialect: Dialect) -> None:
    body = guarded.http.post(path, json=QUESTION).json()
    assert body["error"]["type"] == "authentication_error"
    assert ("type" in body) == (dialect == "anthropic")


def test_pages_of_other_sites_are_turned_away(guarded: Running, served: Running) -> None:
    def status(one: Running, origin: str, **headers: str) -> int:
        given = {"origin": origin, "x-api-key": "sesame", **headers}
        return one.http.post("/v1/chat/completions", json=QUESTION, headers=given).status_code

    assert status(guarded, "https://evil.example") == 403
    assert status(guarded, "https://app.example") == 200
    assert status(served, served.url) == 200
    assert status(served, "null") == 403
    # A page whose own name was made to lead here.
    assert status(served, "http://evil.example:80", host="evil.example:80") == 403


def test_a_browser_is_told_what_a_page_may_do(guarded: Running) -> None:
    asked = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,authorization,x-stainless-os,x-stainless-retry-count",
    }
    response = guarded.http.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    refused = guarded.http.options("/v1/chat/completions", headers={**asked, "origin": "https://evil.example"})
    assert refused.status_code == 403
    for origin, can_read in (("https://app.example", True), ("https://evil.example", False)):
        unknown = guarded.http.post("/v1/chat/completions", json=QUESTION, headers={"origin": origin})
        assert unknown.status_code == (401 if can_read else 403)
        assert unknown.headers.get("access-control-allow-origin") == (origin if can_read else None)


def test_one_too_many_is_sent_away_with_the_numbers() -> None:
    with running(new_service(max_rows=1, max_waiting=0)) as one:
        ends = {str(token_id): -100 for token_id in one.service.tokenizer.stop_ids}
        long = {**QUESTION, "max_tokens": 3000, "logit_bias": ends, "stream": True}
        with one.http.stream("POST", "/v1/chat/completions", json=long) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            response = one.http.post("/v1/chat/completions", json=QUESTION)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        wait_until(one.is_idle)
        one.check_alive()


def test_more_answers_than_there_can_be_at_a_time_are_the_request_s_fault() -> None:
    with running(new_service(max_rows=1, max_waiting=2)) as one:
        for path, fields in (("chat/completions", QUESTION), ("completions", {"prompt": ["a", "b"]})):
            response = one.http.post(f"/v1/{path}", json={**fields, "n": 4, "max_tokens": 1})
            assert response.status_code == 400
            assert "at most 3" in response.json()["error"]["message"]
            assert response.json()["error"]["param"] == "n"


def test_an_answer_that_takes_too_long_is_ended() -> None:
    with running(new_service(request_timeout_s=0.05)) as one:
        body = {**QUESTION, "max_tokens": 3000, "logit_bias": {str(i): -100 for i in one.service.tokenizer.stop_ids}}
        response = one.http.post("/v1/chat/completions", json=body)
        assert response.status_code == 504
        with one.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert '"code":"timeout"' in lines[-1]


def test_names_that_clients_make_up_do_not_fill_the_metrics(served: Running) -> None:
    for method in ("BREW", "WHEN"):
        assert served.http.request(method, "/v1/models").status_code == 405
    lines = served.http.get("/metrics").text.splitlines()
    methods = {line.split('method="')[1].split('"')[0] for line in lines if line.startswith("http_requests_total")}
    assert "other" in methods
    assert not methods & {"BREW", "WHEN"}


def test_clients_of_both_interfaces_find_the_id_of_a_request(served: Running) -> None:
    headers = served.http.get("/v1/models", headers={"x-request-id": "mine"}).headers
    assert headers["x-request-id"] == headers["request-id"] == "mine"


def test_an_encoded_body_is_refused_by_its_encoding(served: Running) -> None:
    packed = gzip.compress(json.dumps(QUESTION).encode())
    response = served.http.post("/v1/chat/completions", content=packed, headers={"content-encoding": "gzip"})
    assert response.status_code == 415
    assert "gzip" in response.json()["error"]["message"]
    plain = served.http.post("/v1/chat/completions", json=QUESTION, headers={"content-encoding": "identity"})
    assert plain.status_code == 200
