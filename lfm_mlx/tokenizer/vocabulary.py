"""What a tokenizer and its detokenizer ask of a vocabulary, whichever file it was read from."""

from typing import Literal, Protocol

ByteErrors = Literal["replace", "surrogateescape"]
"""How bytes that are no UTF-8 become text: "replace" writes one U+FFFD per broken character, as Rust's lossy decoding
does; "surrogateescape" marks each byte, and the detokenizer then writes one U+FFFD per byte, as sentencepiece does."""


class Vocabulary(Protocol):
    """Tokens with their ids and bytes. A token's text is its bytes; texts are joined as bytes, then read as UTF-8."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def byte_errors(self) -> ByteErrors:
        """How bytes that are no UTF-8 become text."""

    @property
    def strips_all_opening_spaces(self) -> bool:
        """Whether `opening_bytes` counts until the first visible token, not for the first token alone."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; strings of special tokens become their ids, nothing is added around them."""

    def token_id(self, token: str) -> int | None:
        """The id of a token given as the string that the vocabulary holds, None when it holds none."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token in the middle of a text; b"" for an id below `size` that stands for no token."""

    def opening_bytes(self, token_id: int) -> bytes:
        """The bytes of a token at the start of a text, where sentencepiece drops the space that it put there."""

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of control tokens, left out by `decode(..., skip_special=True)`."""

    def is_special(self, token_id: int) -> bool:
        """Whether the id is one of `special_ids`."""

    def adds_bos(self, bos_id: int, declared: bool | None) -> bool:
        """Whether raw text begins with `bos_id`; `declared` is tokenizer_config.json's `add_bos_token`."""
