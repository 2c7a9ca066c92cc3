"""The vocabulary of a tokenizer.model, read by the `sentencepiece` library."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lfm_mlx.errors import CheckpointError
from lfm_mlx.tokenizer.tokenizer_files import TokenizerFiles
from lfm_mlx.tokenizer.vocabulary import ByteErrors

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "▁"

# Appended to a serialized ModelProto: field 3 (normalizer_spec) with its field 3 (add_dummy_prefix) false. Protobuf
# merges a message that stands there twice, the later value wins.
_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceVocabulary:
    """A tokenizer.model and the added tokens that the other files declare.

    Text is cut at special tokens first. Only the part at the very start gets sentencepiece's dummy space, so what
    stands after a special token comes back from `decode` without one (transformers' `legacy=False`).
    """

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        model = _read_model(path)
        self._at_start = _read_processor(path, model)
        self._elsewhere = _read_processor(path, model + _WITHOUT_DUMMY_PREFIX)
        self._piece_count: int = self._at_start.piece_size()
        self._strips_opening_space, self.strips_all_opening_spaces = _opening_space_rule(path, self._at_start)
        self.byte_errors: ByteErrors = "surrogateescape"
        controls = [i for i in range(self._piece_count) if self._at_start.is_control(i)]
        self._text_of_added: dict[int, str] = {i: self._at_start.id_to_piece(i) for i in controls}
        self._id_of_added = {text: i for i, text in self._text_of_added.items()}
        self.special_ids = frozenset((*controls, *self._add_tokens(path, files)))
        self.size = max(self._piece_count, max(self._text_of_added, default=-1) + 1)
        longest_first = sorted(self._id_of_added, key=len, reverse=True)
        self._added = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def _add_tokens(self, path: Path, files: TokenizerFiles) -> set[int]:
        """Take in the declared tokens; returns the ids of those that are special."""
        special_ids = set()
        for declared_id, token in (*files.declared_tokens, *files.named_tokens):
            if token.content in self._id_of_added and declared_id is None:
                continue
            if token.lstrip or token.rstrip or token.single_word:
                raise CheckpointError(
                    f"{path.parent}: added token {token.content!r} has lstrip, rstrip or single_word set, which is not "
                    "supported beside a tokenizer.model; use a checkpoint with a tokenizer.json"
                )
            token_id = self._id_for(token.content) if declared_id is None else declared_id
            self._text_of_added[token_id] = token.content
            self._id_of_added[token.content] = token_id
            if token.special:
                special_ids.add(token_id)
        return special_ids

    def _id_for(self, token: str) -> int:
        """The id of a token whose file names none: its piece, or the next free id as transformers takes it."""
        piece_id: int = self._at_start.piece_to_id(token)
        if self._at_start.id_to_piece(piece_id) == token:
            return piece_id
        return max(self._piece_count, max(self._text_of_added, default=-1) + 1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self._added.split(text) if self._added else [text]
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._id_of_added[part])
            elif part:
                ids += (self._at_start if index == 0 else self._elsewhere).encode(part)
        return ids

    def token_id(self, token: str) -> int | None:
        if token in self._id_of_added:
            return self._id_of_added[token]
        piece_id: int = self._at_start.piece_to_id(token)
        is_known = self._at_start.id_to_piece(piece_id) == token and piece_id not in self._text_of_added
        return piece_id if is_known else None

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._text_of_added:
            return self._text_of_added[token_id].encode()
        if token_id >= self._piece_count:
            return b""
        if self._at_start.is_unknown(token_id):
            mark: str = self._at_start.decode([token_id])  # often " ⁇ "
            return mark.encode()
        piece: str = self._at_start.id_to_piece(token_id)
        if self._at_start.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        return piece.replace(_SPACE, " ").encode()

    def opening_bytes(self, token_id: int) -> bytes:
        token_bytes = self.token_bytes(token_id)
        is_piece = token_id < self._piece_count and token_id not in self._text_of_added
        # The spaces of a byte token and of the unknown token's mark are not the dummy space.
        if self._strips_opening_space and is_piece and self._at_start.id_to_piece(token_id).startswith(_SPACE):
            return token_bytes.removeprefix(b" ")
        return token_bytes

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def adds_bos(self, bos_id: int, declared: bool | None) -> bool:
        # The file itself says nothing; models of this kind (Llama's) begin with BOS unless the config forbids it.
        return declared is not False


def _read_model(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch the file again") from error


def _read_processor(path: Path, model: bytes) -> "SentencePieceProcessor":
    # Not needed for the tokenizer.json that every LFM2 repository has; its native library takes a while to load.
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a readable sentencepiece model: {error}; expected a serialized ModelProto; "
            "fetch the file again"
        ) from error
    return processor


def _opening_space_rule(path: Path, processor: "SentencePieceProcessor") -> tuple[bool, bool]:
    """Whether decoding drops an opening space, and whether it drops more than one; asked of the library itself."""
    space_id: int = processor.piece_to_id(_SPACE)
    if processor.is_unknown(space_id):
        raise CheckpointError(
            f"{path} has no piece {_SPACE!r}, expected one in every sentencepiece model that marks spaces; "
            "use a checkpoint with a tokenizer.json"
        )
    kept_spaces = len(processor.decode([space_id, space_id]))
    return kept_spaces < 2, kept_spaces == 0
