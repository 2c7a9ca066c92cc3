"""Tiny checkpoints of random weights that take messages: a byte-level tokenizer and a chat template beside a model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import tokenizers
from random_models import Stored, tiny_config, write_checkpoint
from tokenizers import decoders, models, pre_tokenizers, trainers

from lfm_mlx.tokenizer import special

SPECIAL_TOKENS = [special.PAD, special.BOS, special.END_OF_TEXT, special.TURN_START, special.TURN_END]

TEMPLATE = """{{ bos_token -}}
{%- if tools %}<|im_start|>system
List of tools: {{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}{% if shout %}!{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

VOCAB_SIZE = 320


@functools.cache
def tokenizer_json() -> str:
    """A byte-level BPE of five special tokens, all bytes, and a few longer tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "What is the capital of France? The capital of France is Paris. user assistant system tools: weather"
    backend.train_from_iterator([text] * 3, trainer)
    return str(backend.to_str())


def chat_config(**changes: Any) -> dict[str, Any]:
    """config.json of a tiny mixture of experts with this vocabulary."""
    stop_id = SPECIAL_TOKENS.index(special.TURN_END)
    return tiny_config(vocab_size=VOCAB_SIZE, eos_token_id=stop_id, **changes)


def write_chat_checkpoint(
    folder: Path,
    raw: dict[str, Any] | None = None,
    *,
    has_template: bool = True,
    generation_config: dict[str, Any] | None = None,
    seed: int = 0,
    stored: Stored | None = None,
) -> Path:
    """Write a checkpoint that `lfm_mlx.load` takes, and return its folder.

    Args:
        folder: made if it does not exist.
        raw: config.json, by default `chat_config()`.
        has_template: whether it has a chat template.
        generation_config: generation_config.json; by default one that asks for greedy decoding.
        seed: of the weights.
        stored: how each matrix is quantised; None: nothing is.
    """
    write_checkpoint(folder, raw or chat_config(), seed, stored=stored)
    write_tokenizer(folder, has_template=has_template)
    (folder / "generation_config.json").write_text(json.dumps(generation_config or {"do_sample": False}))
    return folder


def write_tokenizer(folder: Path, *, has_template: bool = True) -> None:
    """Write the tokenizer's files into a checkpoint folder."""
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    config = {"bos_token": special.BOS, "eos_token": special.TURN_END, "pad_token": special.PAD, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if has_template:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
