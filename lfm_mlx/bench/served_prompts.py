"""What the bench of servers asks: conversations of chosen length, made up from a seed, no two of which begin alike."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_mlx.tokenizer import Tokenizer

WORDS = """
the weather in a city is sunny and the capital of France is Paris while a train leaves from the north at nine with ten
people who read what time it was when they asked for an answer about water and light in summer
""".split()  # noqa: SIM905  # A list of words reads better as text.

TOOLS: Sequence[Mapping[str, Any]] = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
)
TOOL_QUESTION = "What's the weather in Paris?"
TOOL_RESULT = '{"temperature": 18, "condition": "sunny"}'


class Prompts:
    """Makes requests up.

    Args:
        tokenizer: of the model that is served: it counts.
        seed: another one makes other requests.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._drawn = 0

    def text(self, num_tokens: int) -> str:
        """Words of about so many tokens, which begin as no others do."""
        self._drawn += 1
        words = [f"Note {self._drawn} {self._random.randrange(10**6)}:"]
        while True:
            text = " ".join(words)
            missing = num_tokens - len(self._tokenizer.encode(text))
            if missing <= 0:
                return text
            words += self._random.choices(WORDS, k=max(1, missing // 2))

    def request(self, num_tokens: int, max_tokens: int) -> dict[str, Any]:
        """A question of so many tokens whose answer is as long as it may be, and drawn freely."""
        return {
            "messages": [{"role": "user", "content": self.text(num_tokens)}],
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "logit_bias": {str(token): -100 for token in sorted(self._tokenizer.stop_ids)},
        }

    def after_system(self, system: str, max_tokens: int) -> dict[str, Any]:
        """A short question after a system message."""
        request = self.request(16, max_tokens)
        return {**request, "messages": [{"role": "system", "content": system}, *request["messages"]]}

    def tool_turn(self, num_tokens: int) -> dict[str, Any]:
        """A question after so many tokens of context that makes the model call a tool."""
        text = f"{self.text(num_tokens)}\n{TOOL_QUESTION}"
        messages = [{"role": "user", "content": text}, *calm_answer(), {"role": "user", "content": TOOL_QUESTION}]
        return {"messages": messages, "max_tokens": 200, "temperature": 0, "tools": list(TOOLS)}


def calm_answer() -> list[dict[str, Any]]:
    """An answer that leaves the question open."""
    return [{"role": "assistant", "content": "Ask me again."}]


def after_call(first: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """The turn after a call: the same conversation with the call and its result.

    Args:
        first: the request.
        message: its answer; where the model called nothing, a call is made up.
    """
    calls = message.get("tool_calls") or [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": TOOL_RESULT} for call in calls]
    return {**first, "messages": [*first["messages"], {**message, "tool_calls": calls}, *results]}
