"""The tokenizer as llguidance needs it: every token's exact bytes, special tokens apart, and grammars compiled once."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from lfm_mlx.constrain.reason import one_line
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer, special

Mask = NDArray[np.uint32]
"""One row of allowed tokens, (ceil(V / 32),) uint32: token t is bit t % 32 of word t // 32."""

MARKERS = (special.THINK_START, special.THINK_END, special.TOOL_CALL_START, special.TOOL_CALL_END)
"""What gives an answer its parts. A grammar writes them as single tokens; text never spells them."""

_CONTROL_TOKENS = tuple(text for name, text in vars(special).items() if name.isupper())
# What both kinds of string literal can hold as it stands: one walk over the vocabulary serves every string.
_SLICES = [r"[^\"'\\\x00-\x1F\x7F]{1,30}"]
_MAX_GRAMMARS = 64
_MAX_ITEMS = 5_000
"""Ways to go on from one place: so many choices, or a fourth as many optional properties. With free keys beside them a
mask then takes a tenth of a second, and ten times that with four times as many; llguidance's own limit is 2,000."""


class GrammarTokenizer:
    """A vocabulary for grammars. Make one with `grammar_tokenizer`, which keeps it: at V = 128,000 it costs a second.

    Attributes:
        vocab_size: V, the width of a mask; ids that stand for no token are never allowed.
        num_words: the length of a `Mask`.
        stop_ids: the ids that end an answer.
        special_ids: control tokens and markers; none of them matches text.

    Raises:
        OptionError: `vocab_size` is smaller than the tokenizer's, or there is no stop token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self.num_words = (self.vocab_size + 31) // 32
        self.stop_ids = tokenizer.stop_ids
        self._check(tokenizer)
        self._tokenizer = tokenizer
        ids = range(tokenizer.vocab_size)
        named = [tokenizer.token_id(text) for text in _CONTROL_TOKENS]
        control = {token_id for token_id in named if token_id is not None}
        self.special_ids: frozenset[int] = frozenset(control) | self.stop_ids | tokenizer.special_ids
        self.token_bytes = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.token_bytes += [b""] * (self.vocab_size - len(self.token_bytes))
        source = _TokenizerSource(tokenizer, self.token_bytes, self.special_ids)
        wrapper = TokenizerWrapper(source)
        self.native = LLTokenizer(wrapper, eos_token=sorted(self.stop_ids), slices=_SLICES)
        self._grammars: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def _check(self, tokenizer: Tokenizer) -> None:
        if self.vocab_size < tokenizer.vocab_size:
            raise OptionError(
                f"vocab_size is {self.vocab_size}, expected at least the tokenizer's {tokenizer.vocab_size}; "
                "does the tokenizer belong to this model?"
            )
        if not self.stop_ids:
            raise OptionError("the tokenizer has no stop token, expected one; a constrained answer could not end")

    def marker(self, text: str) -> int | None:
        """The id of a marker token such as `<|tool_call_start|>`, None where the vocabulary has none."""
        return self._tokenizer.token_id(text)

    def compile(self, grammar: str) -> LLMatcher:
        """A fresh matcher for a grammar in llguidance's form; the compiled grammar is kept for the next request.

        Raises:
            OptionError: llguidance refuses the grammar.
        """
        with self._lock:
            known = self._grammars.get(grammar)
            if known is not None:
                self._grammars.move_to_end(grammar)
                return known.deep_copy()
        prototype = LLMatcher(self.native, grammar, log_level=0, limits=LLParserLimits(max_items_in_row=_MAX_ITEMS))
        if prototype.is_error():
            raise OptionError(f"the grammar is refused: {one_line(prototype.get_error())}; rewrite what is named there")
        prototype.compute_bitmask()  # this is where llguidance notices; the first step needs it anyway
        if prototype.is_stopped() and not prototype.is_accepting():
            raise OptionError("the grammar matches nothing, not even an empty answer; rewrite it")
        with self._lock:
            self._grammars[grammar] = prototype
            while len(self._grammars) > _MAX_GRAMMARS:
                self._grammars.popitem(last=False)
            # Under the lock: nobody may copy a prototype while it is being copied.
            return prototype.deep_copy()

    def pack(self, ids: Iterable[int]) -> Mask:
        """The mask that allows exactly `ids`."""
        flags = np.zeros(self.num_words * 32, dtype=np.uint8)
        flags[list(ids)] = 1
        return cast(Mask, np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32))

    @cached_property
    def text_mask(self) -> Mask:
        """Every token that is text; without those that spell a whole marker."""
        names = [text.encode() for text in MARKERS]
        return self.pack(
            token_id
            for token_id, token in enumerate(self.token_bytes)
            if token and token_id not in self.special_ids and not any(name in token for name in names)
        )

    @cached_property
    def blank_line_ids(self) -> tuple[int, ...]:
        """The tokens of one and of two line breaks."""
        return tuple(index for index, token in enumerate(self.token_bytes) if token in (b"\n", b"\n\n"))

    def completions(self, tail: bytes) -> Iterator[int]:
        """The text tokens that would complete a marker whose first bytes are `tail`."""
        for name in (text.encode() for text in MARKERS):
            if not name.startswith(tail):
                continue
            rest = name[len(tail) :]
            start = bisect_left(self._sorted_tokens, (rest, -1))
            for token, token_id in self._sorted_tokens[start:]:
                if not token.startswith(rest):
                    break
                yield token_id

    @cached_property
    def _sorted_tokens(self) -> list[tuple[bytes, int]]:
        pairs = ((token, token_id) for token_id, token in enumerate(self.token_bytes))
        return sorted(pair for pair in pairs if pair[0] and pair[1] not in self.special_ids)


@lru_cache(maxsize=4)
def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int | None = None) -> GrammarTokenizer:
    """The `GrammarTokenizer` of a tokenizer, built once for each pair of arguments.

    Args:
        tokenizer: a checkpoint's tokenizer.
        vocab_size: V, the width of the model's logits; None takes the tokenizer's.
    """
    return GrammarTokenizer(tokenizer, vocab_size)


class _TokenizerSource:
    """The attributes that `llguidance.TokenizerWrapper` reads, and text to ids for what a grammar forces."""

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self._special_ids = special_ids

    def __call__(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_bos=False)
        for token_id in ids:
            if token_id in self._special_ids:
                # Text that spells a special token stays text: cut inside the spelling, tokenise the halves.
                cut = text.index(self.tokens[token_id].decode()) + 1
                return [*self(text[:cut]), *self(text[cut:])]
        return ids
