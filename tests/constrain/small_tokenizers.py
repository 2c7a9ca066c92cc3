"""A small byte-level BPE with LFM2's special tokens, and a wide synthetic vocabulary for timing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from lfm_mlx.tokenizer import Tokenizer, load_tokenizer, special

SPECIAL_TOKENS = (
    special.PAD, special.BOS, special.END_OF_TEXT, special.TURN_START, special.TURN_END,
    special.TOOL_CALL_START, special.TOOL_CALL_END,
)  # fmt: skip
THINK_TOKENS = (special.THINK_START, special.THINK_END)
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
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special.BOS, "eos_token": special.TURN_END, "pad_token": special.PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def small_tokenizer(folder: Path, *, model_vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of `write_tokenizer`; it stops at `<|im_end|>` and `<|endoftext|>`."""
    return load_tokenizer(write_tokenizer(folder), model_vocab_size=model_vocab_size)


def wide_tokenizer(folder: Path, vocab_size: int = 128_000) -> Tokenizer:
    """A tokenizer whose tokens are as many and as long as LFM2.5's: bytes, words, numbers, punctuation, white space."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *THINK_TOKENS, *alphabet])}
    for token in _wide_tokens():
        if len(vocabulary) == vocab_size:
            break
        vocabulary.setdefault(token, len(vocabulary))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special.BOS, "eos_token": special.TURN_END, "pad_token": special.PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def _wide_tokens() -> Iterator[str]:
    space, newline, tab = "Ġ", "Ċ", "ĉ"
    for number in range(1000):
        yield str(number)
    for length in range(1, 65):
        yield from (space * length, tab * min(length, 16), newline * min(length, 16), newline + space * length)
    marks = "\"'`.,:;!?()[]{}<>=+-*/\\|&^%$#@~_"
    for first in marks:
        for second in ["", *marks]:
            for third in ["", '"', "'", ",", ")", "]", "}", ":", newline]:
                yield from (first + second + third, space + first + second + third)
    rng = random.Random(0)
    syllables = [
        a + b + c for a in ["", *"bcdfghklmnprstvw", "st", "tr", "ch"] for b in "aeiou" for c in ["", *"nrslt"]
    ]
    accents = ["Ã©", "Ã¼", "Ã¶", "Ð¿", "Ðµ", "æĹ", "¥æľ", "ä¸", "ãģ", "ðŁĻ"]
    while True:
        word = "".join(rng.choice(syllables) for _ in range(rng.choice([1, 1, 2, 2, 2, 3, 3, 4])))
        if rng.random() < 0.15:
            word += rng.choice(accents) * rng.randint(1, 2)
        yield from (word, space + word)
        if rng.random() < 0.3:
            yield from (word.capitalize(), space + word.capitalize(), "_" + word, "." + word)
