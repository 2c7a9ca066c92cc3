"""The parts of an answer that no grammar rules: reasoning, and text before and after tool calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lfm_mlx.constrain.grammar_tokenizer import MARKERS, GrammarTokenizer, Mask

_MARKER_BYTES = tuple(text.encode() for text in MARKERS)
_MAX_TAIL_LEN = max(map(len, _MARKER_BYTES)) - 1


class FreeText:
    """Any text, and the special tokens that lead out of it. Its mask is a constant: nothing is computed per token.

    Only where the text so far ends in the first bytes of a marker, the tokens that would spell the marker out are taken
    away: a parser that reads text must see a marker exactly where the model wrote the marker token.

    Args:
        tokenizer: the vocabulary.
        exits: the special tokens that may be written.
        has_text: False allows nothing but the exits.
    """

    def __init__(self, tokenizer: GrammarTokenizer, exits: Iterable[int], *, has_text: bool = True) -> None:
        self._tokenizer = tokenizer
        self.exits = frozenset(exits)
        self.has_text = has_text
        self._mask = tokenizer.pack(self.exits)
        if has_text:
            self._mask |= tokenizer.text_mask
        self._mask.flags.writeable = False
        self._guarded: dict[bytes, Mask] = {b"": self._mask}

    def mask(self, ids: Sequence[int]) -> Mask:
        """The tokens that may follow `ids`, the text's tokens so far; read-only."""
        tail = self._tail(ids)
        guarded = self._guarded.get(tail)
        if guarded is None:
            guarded = self._mask & ~self._tokenizer.pack(self._tokenizer.completions(tail))
            guarded.flags.writeable = False
            self._guarded[tail] = guarded
        return guarded

    def _tail(self, ids: Sequence[int]) -> bytes:
        """The end of the text that is the beginning of a marker, b"" where there is none."""
        token_bytes = self._tokenizer.token_bytes
        text = b""
        for token_id in reversed(ids):
            text = token_bytes[token_id] + text
            if b"<" in text or len(text) >= _MAX_TAIL_LEN:
                break
        start = text.rfind(b"<")
        tail = text[start:] if start >= 0 else b""
        return tail if any(name.startswith(tail) for name in _MARKER_BYTES) else b""
