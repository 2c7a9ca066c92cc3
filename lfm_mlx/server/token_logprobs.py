"""Log-probabilities of an answer's tokens, as OpenAI's interfaces write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfm_mlx.engine import TokenLogprob
from lfm_mlx.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for the logarithm of nothing, which JSON cannot write."""


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no whole character become U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text_bytes = list(tokenizer.token_bytes(token_id))
        return {"token": token_text(tokenizer, token_id), "logprob": max(logprob, LOWEST), "bytes": text_bytes}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token_id, value) for token_id, value in one.top]}
        for one in found
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, found: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """The `logprobs` of a text completion's choice.

    Args:
        tokenizer: of the tokens.
        found: theirs.
        offset: characters in front of the first of them.
    """
    texts = [token_text(tokenizer, one.token_id) for one in found]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(one.logprob, LOWEST) for one in found],
        "top_logprobs": [
            {token_text(tokenizer, token_id): max(value, LOWEST) for token_id, value in one.top} for one in found
        ],
        "text_offset": offsets,
    }
