"""Token ids to text, one token at a time."""

import codecs
import re

from lfm_mlx.tokenizer.vocabulary import Vocabulary

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class StreamingDetokenizer:
    """Turns token ids into text as they arrive.

    What `add` and `finish` return, joined, is what `Tokenizer.decode` makes of all the ids. Text is returned as soon as
    its bytes are whole characters: at most three bytes, the beginning of one character, are held back. Each token
    costs the same, however long the text is.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = False) -> None:
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._utf8 = _utf8_decoder(errors=vocabulary.byte_errors)
        self._at_start = True

    def add(self, token_id: int) -> str:
        """The text that became final with this token, often "" in the middle of a character.

        Raises:
            OptionError: there is no such id.
        """
        if self._skip_special and self._vocabulary.is_special(token_id):
            return ""
        if self._at_start:
            token = self._vocabulary.opening_bytes(token_id)
            self._at_start = not token and self._vocabulary.strips_all_opening_spaces
        else:
            token = self._vocabulary.token_bytes(token_id)
        return _mark_broken_bytes(self._utf8.decode(token))

    def finish(self) -> str:
        """The rest of the text: U+FFFD for a character that was never completed, else "". Then a new text begins."""
        rest = _mark_broken_bytes(self._utf8.decode(b"", final=True))
        self._at_start = True
        return rest


def _mark_broken_bytes(text: str) -> str:
    """Write U+FFFD for each byte that the UTF-8 decoder escaped as a lone surrogate."""
    return text if text.isascii() else _ESCAPED_BYTE.sub("\ufffd", text)
