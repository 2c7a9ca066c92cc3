"""A model that writes what a test wants: random weights, the tiny checkpoint's tokenizer, and scripts for answers.

Every token of a script goes through the model as a forced one, so that states, caches and limits are the real ones.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from random_models import tiny_config, tiny_model

from lfm_mlx.chat import Chat, RenderedPrompt, answer
from lfm_mlx.chat.answer import AnswerOptions, reasoning_tokens
from lfm_mlx.engine.control import Control
from lfm_mlx.model import Model
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.tokenizer.tokenizer import load_tokenizer

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny"


@functools.cache
def tokenizer(template: str | None = None) -> Tokenizer:
    """The tokenizer of examples/tiny, with another chat template if one is given."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
            shutil.copy(TINY / name, folder)
        if template is not None:
            (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        return load_tokenizer(Path(folder))


@functools.cache
def model() -> Model:
    """A tiny mixture of experts of random weights for this tokenizer."""
    size = tokenizer().vocab_size
    built = tiny_model(tiny_config(vocab_size=size, eos_token_id=tokenizer().eos_id, max_position_embeddings=4096))
    mx.eval(built.parameters())  # as `load` does, for other threads
    return built


def chat(template: str | None = None, **options: Any) -> Chat:
    """A chat with the random model."""
    return Chat(model(), tokenizer(template), **options)


class Script:
    """The texts of the answers to come; an answer beyond the last one is the model's own.

    Args:
        monkeypatch: takes the script away at the end of the test.
        texts: what the model writes, answer by answer, markers included; the turn's end is added.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self._make_control = answer.make_control
        monkeypatch.setattr(answer, "make_control", self._control)

    def _control(self, model: Model, tokenizer: Tokenizer, prompt: RenderedPrompt, options: AnswerOptions) -> Control:
        text = next(self._texts, None)
        if text is None:
            return self._make_control(model, tokenizer, prompt, options)
        control = Control(reasoning=reasoning_tokens(tokenizer), is_in_reasoning=prompt.opens_reasoning)
        control._queue.extend([*tokenizer.encode(text, add_bos=False), tokenizer.eos_id])
        return control
