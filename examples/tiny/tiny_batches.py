"""Batches for training: samples rendered by the chat template, tokenised, weighted and grouped by length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from tiny_data import Conversations, Sample
from tiny_training import Batch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

__all__ = ["BatchStream", "Renderer", "stream_batches"]

LENGTHS = (96, 160, 224, 288, 352, 448, 576, 768, 1152, 2048)
PROMPT_WEIGHT = 0.2
PROMPT_SHARE = 0.3


class Renderer:
    """Renders samples through the chat template, compiled once."""

    def __init__(self, template: str, bos_token: str) -> None:
        self._template = _compile_jinja_template(template)
        self._bos = bos_token

    def prompt(self, sample: Sample) -> str:
        """The text before the answer, ending in the generation prompt."""
        options: dict[str, Any] = dict(sample.options)
        return str(
            self._template.render(
                messages=sample.messages, tools=sample.tools, add_generation_prompt=True, bos_token=self._bos, **options
            )
        )


class BatchStream(IterableDataset[Batch]):
    """An endless stream of batches of about `num_tokens` tokens, short prompts first."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, num_tokens: int, short_steps: int) -> None:
        super().__init__()
        self._tokenizer_json = tokenizer.backend_tokenizer.to_str()
        self._template = str(tokenizer.chat_template)
        self._bos = str(tokenizer.bos_token)
        self._seed = seed
        self._num_tokens = num_tokens
        self._short_steps = short_steps

    def _chance(self, num_tokens: int, step: int) -> float:
        """The chance that a sample of `num_tokens` is used: copying is learnt sooner, and cheaper, on short prompts."""
        done = min(1.0, step / self._short_steps)
        if num_tokens > (LENGTHS[-1] if done == 1.0 else 224 + 800 * done):
            return 0.0
        return min(1.0, float((160 / num_tokens) ** (1.5 - 0.9 * done)))

    def __iter__(self) -> Iterator[Batch]:
        from tokenizers import Tokenizer  # the worker process builds its own; a Tokenizer is not shared over a fork

        torch.set_num_threads(1)
        torch.manual_seed(self._seed)
        tokenizer = Tokenizer.from_str(self._tokenizer_json)
        renderer = Renderer(self._template, self._bos)
        source = Conversations(self._seed)
        rng = random.Random(self._seed + 1)
        waiting: dict[int, list[tuple[list[int], int]]] = {length: [] for length in LENGTHS}
        step = 0
        while True:
            sample = source.sample()
            prompt = tokenizer.encode(renderer.prompt(sample), add_special_tokens=False).ids
            ids = prompt + tokenizer.encode(sample.target, add_special_tokens=False).ids
            if rng.random() > self._chance(len(ids), step):
                continue
            length = next(length for length in LENGTHS if len(ids) <= length + 1)
            waiting[length].append((ids, len(prompt)))
            if len(waiting[length]) * length >= self._num_tokens:
                yield _batch(waiting.pop(length), length, rng)
                waiting[length] = []
                step += 1


def _batch(rows: list[tuple[list[int], int]], length: int, rng: random.Random) -> Batch:
    ids = torch.zeros(len(rows), length + 1, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    positions = torch.arange(length).repeat(len(rows), 1)
    for row, (tokens, num_prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : num_prompt - 1] = (torch.rand(num_prompt - 1) < PROMPT_SHARE) * PROMPT_WEIGHT
        weights[row, num_prompt - 1 : len(tokens) - 1] = 1.0
        # Gaps in the positions make short rows look like long ones to the rotary embedding.
        if rng.random() < 0.25:
            for _ in range(rng.choice((1, 2))):
                positions[row, rng.randrange(1, len(tokens)) :] += rng.randint(1, rng.choice((200, 1000, 2500)))
    return Batch(ids=ids, weights=weights, positions=positions)


def stream_batches(stream: BatchStream) -> Iterator[Batch]:
    """The batches of `stream`, made one step ahead in a process of their own."""
    return iter(DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4))
