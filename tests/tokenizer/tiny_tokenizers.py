"""Small tokenizers of LFM2's kinds, trained here in a moment."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from lfm_mlx.tokenizer import special

SPECIAL_TOKENS = (
    special.PAD,
    special.BOS,
    special.END_OF_TEXT,
    special.TURN_START,
    special.TURN_END,
    special.TOOL_LIST_START,
    special.TOOL_LIST_END,
    special.TOOL_CALL_START,
    special.TOOL_CALL_END,
    special.TOOL_RESPONSE_START,
    special.TOOL_RESPONSE_END,
    special.THINK_START,
    special.THINK_END,
)

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's a test, isn't it? We'll see: 12345 and 67.",
    'user\nassistant\nsystem\ntool\nList of tools: [{"name": "get_weather", "parameters": {}}]\n\n',
    "Füße über Straßen, déjà vu, naïve café; 日本語のテスト、東京は首都です。 Привет, мир! 🙂🙃 👩‍👩‍👧 🇯🇵",
] * 4

CONFIG: dict[str, Any] = {
    "bos_token": special.BOS,
    "eos_token": special.TURN_END,
    "pad_token": special.PAD,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": True,
    "legacy": False,
    "sp_model_kwargs": {},
}


@functools.cache
def byte_level_json() -> str:
    """A byte-level BPE with LFM2's pre-tokenizer, its special tokens first, BOS added by the post-processor."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(
        [tokenizers.AddedToken("日本 café", normalized=False), tokenizers.AddedToken("éÃ", normalized=False)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special.BOS} $A", special_tokens=[(special.BOS, SPECIAL_TOKENS.index(special.BOS))]
    )
    return str(backend.to_str())


def write_json_tokenizer(folder: Path, *, config: dict[str, Any] | None = None, template: str | None = None) -> Path:
    """Write a checkpoint folder's tokenizer files in the manner of LFM2's repositories."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(byte_level_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **(config or {})}), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@functools.cache
def sentencepiece_model(**options: Any) -> bytes:
    """A sentencepiece BPE with byte fallback and `<|im_end|>` as a control piece."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS for line in text.splitlines()),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        hard_vocab_limit=False,
        control_symbols=[special.TURN_END],
        minloglevel=3,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    return model.getvalue()


def write_sentencepiece_tokenizer(folder: Path, *, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write a folder that has tokenizer.model and no tokenizer.json; `<|im_start|>` is an added token."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**options))
    base = {"bos_token": "<s>", "eos_token": special.TURN_END, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**base, **(config or {})}), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({special.TURN_START: 700}), encoding="utf-8")
    return folder
