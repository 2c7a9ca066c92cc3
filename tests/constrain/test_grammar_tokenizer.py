from __future__ import annotations

import re

import pytest

from lfm_mlx.constrain import GrammarTokenizer, grammar_tokenizer
from lfm_mlx.constrain.integer_range import integer_range
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer, special


def test_every_token_has_its_exact_bytes(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    native = vocabulary.native
    assert native.vocab_size == vocabulary.vocab_size
    for token_id in range(tokenizer.vocab_size):
        # llguidance marks its special tokens with the byte 0xFF, which no text holds.
        is_special = token_id in vocabulary.special_ids or tokenizer.token_bytes(token_id).startswith(b"\xff")
        assert native.is_special_token(token_id) is is_special
        if not is_special:
            assert native.decode_bytes([token_id]) == tokenizer.token_bytes(token_id)


def test_markers_are_special_though_the_vocabulary_says_they_are_text(
    vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    think = tokenizer.token_id(special.THINK_START)
    assert think is not None
    assert not tokenizer.is_special(think)
    assert think in vocabulary.special_ids
    assert sorted(vocabulary.native.eos_tokens) == sorted(tokenizer.stop_ids)


def test_a_tokenizer_is_prepared_once(tokenizer: Tokenizer) -> None:
    assert grammar_tokenizer(tokenizer) is grammar_tokenizer(tokenizer)
    assert grammar_tokenizer(tokenizer) is not grammar_tokenizer(tokenizer, tokenizer.vocab_size + 1)


def test_a_narrower_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(OptionError, match="expected at least the tokenizer's"):
        GrammarTokenizer(tokenizer, tokenizer.vocab_size - 1)


@pytest.mark.parametrize("low", [None, -120, -10, -1, 0, 1, 7, 10, 99, 100])
@pytest.mark.parametrize("high", [None, -101, -1, 0, 9, 10, 42, 100, 1234])
def test_an_integer_range_matches_the_integers_within(low: int | None, high: int | None) -> None:
    regex = integer_range(low, high)
    if regex is None:
        assert low is not None
        assert high is not None
        assert low > high
        return
    for value in range(-1500, 1501):
        is_within = (low is None or value >= low) and (high is None or value <= high)
        assert bool(re.fullmatch(regex, str(value))) is is_within
    assert not re.fullmatch(regex, "01")
