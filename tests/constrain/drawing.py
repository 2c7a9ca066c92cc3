"""Answers drawn from noise under a mask: what a constraint lets through when the model gives no help at all."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfm_mlx.bench.mask_time import allowed_ids
from lfm_mlx.constrain import Constraint, GrammarTokenizer, Matcher
from lfm_mlx.tokenizer import Tokenizer

CLOSING = (b'"', b"'", b"]", b"}", b")", b"<|im_end|>", b"</think>", b"<|tool_call_end|>")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A drawn answer without its stop token, and whether it came to an end or was cut by `max_tokens`."""

    ids: list[int]
    text: str
    is_complete: bool


def draw(matcher: Matcher, vocabulary: GrammarTokenizer, rng: np.random.Generator, *, max_tokens: int = 120) -> Answer:
    """Draw from random logits at temperature 1.5; towards the end, tokens that close something are preferred."""
    closing = [index for index, token in enumerate(vocabulary.token_bytes) if token in CLOSING]
    ids: list[int] = []
    for position in range(max_tokens):
        logits = 3 * rng.standard_normal(vocabulary.vocab_size)
        logits[closing] += 12 if position > max_tokens // 4 else 2
        allowed = allowed_ids(matcher.mask())
        assert len(allowed), f"nothing is allowed after {ids}"
        token_id = int(allowed[np.argmax(logits[allowed] / 1.5 + rng.gumbel(size=len(allowed)))])
        matcher.accept(token_id)
        if token_id in vocabulary.stop_ids:
            break
        ids.append(token_id)
    text = b"".join(vocabulary.token_bytes[token_id] for token_id in ids).decode(errors="replace")
    return Answer(ids=ids, text=text, is_complete=matcher.is_complete)


def answers(
    constraint: Constraint, vocabulary: GrammarTokenizer, count: int, *, max_tokens: int = 120, share: float = 0.5
) -> Iterator[Answer]:
    """Drawn answers that came to an end; at least this share of all does, or the test says nothing."""
    num_complete = 0
    for seed in range(count):
        answer = draw(Matcher(constraint, vocabulary), vocabulary, np.random.default_rng(seed), max_tokens=max_tokens)
        if answer.is_complete:
            num_complete += 1
            yield answer
    assert num_complete >= count * share, f"only {num_complete} of {count} answers came to an end"


def accepts(constraint: Constraint, vocabulary: GrammarTokenizer, ids: list[int]) -> bool:
    """Whether `ids` is a complete answer."""
    matcher = Matcher(constraint, vocabulary)
    for token_id in ids:
        if not matcher.allows(token_id):
            return False
        matcher.accept(token_id)
    return matcher.is_complete


def accepts_text(constraint: Constraint, vocabulary: GrammarTokenizer, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokens of `text` are a complete answer; the strings of special tokens in it are those tokens."""
    return accepts(constraint, vocabulary, tokenizer.encode(text, add_bos=False))


def read_pythonic(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls in `[f(a=1), ...]`, read by Python's own parser; true, false and null only inside containers."""
    tree = ast.parse(text, mode="eval").body
    assert isinstance(tree, ast.List)
    calls = []
    for call in tree.elts:
        assert isinstance(call, ast.Call)
        assert not call.args
        assert not any(isinstance(keyword.value, ast.Name) for keyword in call.keywords)
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        assert len(arguments) == len(call.keywords)
        calls.append((ast.unparse(call.func), arguments))
    return calls


def read_json(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls in `[{"name": ..., "arguments": ...}, ...]`."""
    calls = json.loads(text)
    assert all(list(call) == ["name", "arguments"] for call in calls)
    return [(call["name"], call["arguments"]) for call in calls]


class _JsonWords(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.Constant:
        return ast.Constant({"true": True, "false": False, "null": None}[node.id])


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(_JsonWords().visit(node))
