"""Do two models give the same tool calls? Also where the better one does not fit into memory.

The converted model is in memory and answers greedily. Its answers are drafts for the source, whose layers stream past:
one pass tells for all drafts together where the source would have gone on in another way. From there the converted
model drafts again, until every answer is the source's own greedy one, exact to the token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from lfm_mlx.build import build_model
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.errors import OptionError
from lfm_mlx.load import compute_dtype
from lfm_mlx.model import Model
from lfm_mlx.parsing import parse_output
from lfm_mlx.tokenizer import Tokenizer

from .layerwise import Layerwise

MAX_PASSES = 24
"""Passes of the source after which answers that are still undecided are left out."""


@dataclass(kw_only=True)
class Answer:
    """How two models answer one prompt.

    Attributes:
        prompt: the ids of the rendered conversation.
        converted: the converted model's greedy answer.
        source: the source's greedy answer, as far as it is known.
        is_known: whether all of it is.
    """

    prompt: list[int]
    converted: list[int]
    source: list[int] = field(default_factory=list)
    is_known: bool = False


def compare_answers(
    source: Layerwise, out: Path, prompts: Sequence[list[int]], stop_ids: frozenset[int], *, max_tokens: int
) -> list[Answer]:
    """Greedy answers of the model in `out` and of `source` to the same prompts.

    Args:
        source: the unquantised model; it is passed through a few times.
        out: the converted checkpoint; it is loaded as a whole.
        prompts: ids.
        stop_ids: ids that end an answer.
        max_tokens: longest answer.
    """
    checkpoint = Checkpoint(out)
    dtype = compute_dtype(checkpoint.config, weight_bytes=checkpoint.num_bytes)
    model = build_model(checkpoint.config, checkpoint, dtype)
    answers = []
    for prompt in prompts:
        drafted = greedy(model, prompt, stop_ids, max_tokens)
        answers.append(Answer(prompt=prompt, converted=drafted))
    drafts = [list(answer.converted) for answer in answers]
    for _ in range(MAX_PASSES):
        open_ones = [i for i, answer in enumerate(answers) if not answer.is_known]
        if not open_ones:
            break
        sequences = [answers[i].prompt + drafts[i] for i in open_ones]
        choices = _choices(source, sequences, [len(answers[i].prompt) for i in open_ones])
        for i, choice in zip(open_ones, choices, strict=True):
            answer = answers[i]
            answer.source = _verified(drafts[i], choice)
            if answer.source[-1] in stop_ids or len(answer.source) >= max_tokens:
                answer.is_known = True
                continue
            left = max_tokens - len(answer.source)
            drafts[i] = answer.source + greedy(model, answer.prompt + answer.source, stop_ids, left)
    return answers


def greedy(model: Model, prompt: Sequence[int], stop_ids: frozenset[int], max_tokens: int) -> list[int]:
    """The likeliest continuation of `prompt`, to and with a stop id or `max_tokens` tokens."""
    state = model.new_state()
    tokens, answer = mx.array([list(prompt)]), list[int]()
    while len(answer) < max_tokens:
        hidden = model.hidden(tokens, state)[:, -1:]
        answer.append(int(np.array(mx.argmax(model.head(hidden), axis=-1)).item()))
        if answer[-1] in stop_ids:
            break
        tokens = mx.array([answer[-1:]])
    return answer


def _choices(source: Layerwise, sequences: Sequence[list[int]], prompt_lens: Sequence[int]) -> list[list[int]]:
    """What the source would say at each place of the answers in `sequences`, and after them."""
    hidden = source.run(sequences)
    answers = [x[:, prompt_len - 1 :] for x, prompt_len in zip(hidden, prompt_lens, strict=True)]
    chosen: list[int] = []
    for logits in source.logits(answers):
        chosen += mx.argmax(logits, axis=-1).tolist()  # type: ignore[arg-type]
    split, first = [], 0
    for answer in answers:
        split.append(chosen[first : first + answer.shape[1]])
        first += answer.shape[1]
    return split


def _verified(draft: Sequence[int], choice: Sequence[int]) -> list[int]:
    """The draft up to where the source disagrees, and the source's token there."""
    for i, (drafted, chosen) in enumerate(zip(draft, choice, strict=False)):
        if drafted != chosen:
            return [*draft[:i], chosen]
    return list(draft)


@dataclass(frozen=True, kw_only=True)
class CallAgreement:
    """How many conversations there were, in how many the source called tools, and in how many of these both did alike.

    Two answers are alike when they call the same functions with the same arguments in the same order.
    """

    num_conversations: int
    num_calling: int
    num_alike: int
    num_same_text: int


def agreement_of(answers: Sequence[Answer], tokenizer: Tokenizer, tools: Sequence[Sequence[Any]]) -> CallAgreement:
    """Count the answers whose calls are the same."""
    known = [(answer, offered) for answer, offered in zip(answers, tools, strict=True) if answer.is_known]
    calls = [
        (_calls(tokenizer.decode(answer.source), offered), _calls(tokenizer.decode(answer.converted), offered))
        for answer, offered in known
    ]
    calling = [pair for pair in calls if pair[0]]
    return CallAgreement(
        num_conversations=len(known),
        num_calling=len(calling),
        num_alike=sum(first == second for first, second in calling),
        num_same_text=sum(answer.source == answer.converted for answer, _ in known),
    )


def _calls(text: str, tools: Sequence[Any]) -> list[tuple[str, Any]]:
    try:
        parsed = parse_output(text, tools=list(tools))
    except OptionError:  # a tool of the user's set without a proper schema
        parsed = parse_output(text)
    return [(call.name, call.arguments) for call in parsed.tool_calls]
