"""The vocabulary of a tokenizer.json, read by the `tokenizers` library."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from lfm_mlx.errors import CheckpointError
from lfm_mlx.tokenizer.tokenizer_files import TokenizerFiles
from lfm_mlx.tokenizer.vocabulary import ByteErrors

_BYTE_FALLBACK_STEPS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP_STEP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class JsonVocabulary:
    """A tokenizer.json: byte-level BPE as every LFM2 has it, or a sentencepiece model that was converted to JSON.

    Added tokens that only tokenizer_config.json, special_tokens_map.json or added_tokens.json declare are added as
    transformers adds them, so that the ids are the same.
    """

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        self._backend = _read_backend(path)
        # Left behind by training; a prompt is neither cut nor padded here.
        self._backend.no_truncation()
        self._backend.no_padding()
        special_texts = _special_texts(self._backend)
        _add_declared_tokens(self._backend, files)
        # tokenizers never forgets that a token was special, though a later entry may say otherwise.
        special_texts |= _special_texts(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.content in special_texts)
        self.size = max(self._backend.get_vocab_size(), max(added, default=-1) + 1)
        self._decoder = _DecoderRule(path, self._backend)
        self.byte_errors: ByteErrors = self._decoder.byte_errors
        self.strips_all_opening_spaces = False

    def encode(self, text: str) -> list[int]:
        # Unlike `encode` it lets other threads run meanwhile, and it finds no offsets, which take twice the memory.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._decoder.token_bytes(token)

    def opening_bytes(self, token_id: int) -> bytes:
        token_bytes = self.token_bytes(token_id)
        return token_bytes.removeprefix(b" ") if self._decoder.strips_opening_space else token_bytes

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def adds_bos(self, bos_id: int, declared: bool | None) -> bool:
        # As in transformers, `"add_bos_token": false` does not switch the post-processor of tokenizer.json off.
        return self._backend.encode("", add_special_tokens=True).ids[:1] == [bos_id] or bool(declared)


class _DecoderRule:
    """How one token becomes bytes: the part of the file's decoder that can be said token by token.

    ByteFallback differs from `tokenizers` where bytes are no UTF-8: that library then replaces the whole run of byte
    tokens, its readable characters too, which no stream can know in advance; here a readable character stays.
    """

    def __init__(self, path: Path, backend: tokenizers.Tokenizer) -> None:
        steps = _decoder_steps(backend)
        self.byte_errors: ByteErrors = "replace"
        self.strips_opening_space = False
        self.token_bytes: Callable[[str], bytes]
        if len(steps) == 1 and steps[0]["type"] == "ByteLevel":
            self.token_bytes = _byte_level_bytes
        elif steps[:3] == _BYTE_FALLBACK_STEPS and steps[3:] in ([], [_STRIP_STEP]):
            self.token_bytes = _byte_fallback_bytes
            self.byte_errors = "surrogateescape"
            self.strips_opening_space = _STRIP_STEP in steps
        elif not steps:
            self.token_bytes = _word_bytes
            self.strips_opening_space = True
        else:
            raise CheckpointError(
                f"{path}: the decoder is {json.dumps(steps)}, expected ByteLevel, or the steps of a converted "
                "sentencepiece model; take tokenizer.json from the original LFM2 checkpoint"
            )


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it finds
        raise CheckpointError(
            f"{path} is not a readable tokenizer: {error}; expected a tokenizer.json as `tokenizers` writes it; "
            "fetch the file again"
        ) from error


def _add_declared_tokens(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Add what the other files declare: with its flags from added_tokens_decoder, and else only when it is missing."""
    present = backend.get_added_tokens_decoder().values()
    known_entries = {repr(token) for token in present}
    new = [token for _, token in files.declared_tokens if repr(token) not in known_entries]
    known_texts = {token.content for token in (*present, *new)}
    new += [token for _, token in files.named_tokens if token.content not in known_texts]
    if new:
        backend.add_tokens(new)


def _special_texts(backend: tokenizers.Tokenizer) -> set[str]:
    return {token.content for token in backend.get_added_tokens_decoder().values() if token.special}


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_level_bytes(token: str) -> bytes:
    """The bytes of a byte-level BPE token; a token with any other character, such as a space, is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _word_bytes(token: str) -> bytes:
    """`tokenizers` joins the tokens with spaces when the file has no decoder."""
    return b" " + token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
