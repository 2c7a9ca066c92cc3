"""What earlier requests have computed is used again, and usage tells how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from running_server import WEATHER_TOOL, Running, new_service, running

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 12}


def ask(served: Running, *messages: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], int, int]:
    """The answer, and how many tokens its prompt has and how many of them were there before."""
    body = {"messages": [SYSTEM, *messages], "temperature": 0, "max_tokens": 20, **fields}
    response = served.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    message = response.json()["choices"][0]["message"]
    return message, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def test_prompts_are_continued_not_computed_again(tmp_path: Path) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    other = {"role": "user", "content": "Say hello."}
    with running(new_service(tmp_path)) as served:
        first, prompt_tokens, cached = ask(served, question)
        assert cached == 0
        again, _, cached = ask(served, question)
        assert again == first
        assert prompt_tokens - 20 < cached < prompt_tokens
        _, _, cached = ask(served, other, seed=7)
        assert cached > prompt_tokens / 2, "users share a system prompt"
        _, _, cached = ask(served, question, tools=[WEATHER_TOOL])
        assert 0 < cached < prompt_tokens - 20, "tools stand in the system message, behind its text"
        _, _, cached = ask(served, question, first, other)
        assert cached > prompt_tokens - 20
        count = served.http.get("/metrics").text
        assert "lfm_mlx:prefix_cache_hits_total" in count
    with running(new_service(tmp_path)) as served:
        restored, _, cached = ask(served, question)
        assert restored == first
        assert cached > prompt_tokens / 2, "it survives a restart"
