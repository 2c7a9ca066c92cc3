"""A small byte-level BPE with LFM2's special tokens."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from lfm_mlx.bench.mask_time import SPECIAL_TOKENS, save_tokenizer
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    'user\nassistant\nList of tools: [{"name": "get_weather", "parameters": {"type": "object"}}]\n\n{"a": [true]}',
    "[get_weather(city=\"Paris\", unit='celsius', days=3, m=True), calendar.create_event(title='x', tags=[\"a\"])]",
    "The quick brown fox jumps over the lazy dog. It's a test: 12345 and 67. null, None, False, true, false.",
    "Füße über Straßen, déjà vu, naïve café; 日本語のテスト、東京は首都です。 Привет, мир! 🙂🙃 👩‍👩‍👧",
    "<|tool_call|> <think <tool |> /think> <|im_end> {'k': 'v'} \\n \\\" \"\", '', }], )] ): [] {} \"}",
] * 4


def write_tokenizer(folder: Path, vocab_size: int = 700) -> Path:
    """Write a folder with tokenizer.json and tokenizer_config.json; the think tokens are not special, as in LFM2.5."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return save_tokenizer(backend, folder)


def small_tokenizer(folder: Path, *, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of `write_tokenizer`; it stops at `<|im_end|>` and `<|endoftext|>`."""
    return load_tokenizer(write_tokenizer(folder), model_vocab_size=model_vocab_size)
