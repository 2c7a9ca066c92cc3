"""The tiny checkpoint's tokenizer: byte-level BPE with the special tokens and the pre-tokenizer of LFM2."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIAL_TOKENS", "THINK_TOKENS", "VOCAB_SIZE", "train_tokenizer"]

VOCAB_SIZE = 1344
SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>", "<|im_start|>",
    "<|im_end|>",
    "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
    "<|tool_response_start|>", "<|tool_response_end|>",
)  # fmt: skip
THINK_TOKENS = ("<think>", "</think>")
LFM2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Stricter than LFM2's: no merge joins a letter to a space, a digit or a mark, so ` Paris`, `"Paris"` and `Paris` share
# their tokens, which makes copying a value easy to learn.
TRAINING_PATTERN = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def train_tokenizer(texts: Iterable[str], template: Path) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts` and give it the chat template in the file `template`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _split(TRAINING_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *THINK_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The real pre-tokenizer gives the same ids; it stays so that readers of tokenizer.json meet what LFM2 has.
    tokenizer.pre_tokenizer = _split(LFM2_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    think = [AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS]
    rebuilt = Tokenizer.from_str(tokenizer.to_str())
    rebuilt.add_tokens(think)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=rebuilt,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template.read_text()
    return fast
