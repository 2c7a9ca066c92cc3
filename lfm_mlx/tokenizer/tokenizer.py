"""Text and messages to token ids, and token ids to text."""

import operator
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

from lfm_mlx.errors import CheckpointError, ContextLengthError, OptionError, TemplateError
from lfm_mlx.tokenizer import special
from lfm_mlx.tokenizer.detokenizer import StreamingDetokenizer
from lfm_mlx.tokenizer.json_vocabulary import JsonVocabulary
from lfm_mlx.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from lfm_mlx.tokenizer.template import ChatTemplate
from lfm_mlx.tokenizer.tokenizer_files import TokenizerFiles, read_tokenizer_files
from lfm_mlx.tokenizer.vocabulary import ByteErrors, Vocabulary
from lfm_mlx.types import Message, Tool

LONG_TOKEN = 8
"""Characters that hardly any text has in a token on average."""

PIECE_CHARS, CUT_TOKENS = 8192, 16
"""Of a text that is measured piece by piece: a piece, and tokens that cutting it out may add."""


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Make one with `load_tokenizer`.

    Attributes:
        vocab_size: one more than the highest id that may be decoded.
        bos_id, eos_id, pad_id: the ids of the tokens with these roles, None where the checkpoint names none.
        adds_bos: whether raw text begins with `bos_id`.
        stop_ids: the ids that end an answer.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        files: TokenizerFiles,
        *,
        config_eos_ids: Iterable[int] = (),
        model_vocab_size: int = 0,
    ) -> None:
        self._vocabulary = _CheckedVocabulary(vocabulary, model_vocab_size)
        self._templates = {
            name: ChatTemplate(source, name=_template_name(path, name), special_tokens=files.special_tokens)
            for name, (path, source) in files.template_sources.items()
        }
        self.vocab_size = self._vocabulary.size
        self.bos_id = self._named_id(files, "bos_token")
        self.eos_id = self._named_id(files, "eos_token")
        self.pad_id = self._named_id(files, "pad_token")
        declared = files.config.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and vocabulary.adds_bos(self.bos_id, declared)
        declared_ids = {*config_eos_ids, *files.generation_eos_ids}
        self.stop_ids = frozenset(declared_ids | self._ids_that_end_a_turn())

    def _named_id(self, files: TokenizerFiles, key: str) -> int | None:
        token = files.special_tokens.get(key)
        return None if token is None else self.token_id(token)

    def _ids_that_end_a_turn(self) -> set[int]:
        # generation_config.json of the published checkpoints names <|im_end|> alone; llama.cpp stops at both.
        turn_end, text_end = self.token_id(special.TURN_END), self.token_id(special.END_OF_TEXT)
        ends = {self.eos_id}
        if any(special.TURN_END in template.source for template in self._templates.values()):
            ends.add(turn_end)
        if text_end is not None and self.is_special(text_end):
            ends.add(text_end)
        return {token_id for token_id in ends if token_id is not None}

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._templates)

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """The names that its chat templates look up."""
        return frozenset().union(*(template.variables for template in self._templates.values()))

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """The ids of `text`. The string of a special token in it becomes that token's id, as in transformers.

        Args:
            text: raw text, or a prompt that a template rendered.
            add_bos: put BOS in front if this tokenizer does so (`adds_bos`) and the text does not begin with it.
                Give False for rendered prompts: whether they begin with BOS is the template's choice.

        Raises:
            OptionError: `text` is no string, or has half of a surrogate pair in it.
        """
        _check_text(text)
        ids = self._vocabulary.encode(text)
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def check_length(self, text: str, max_tokens: int) -> None:
        """Refuse a text that is far too long by its beginning alone: encoding megabytes takes gigabytes and minutes.

        Args:
            text: as for `encode`.
            max_tokens: what it may have. Not every text with more is refused.

        Raises:
            ContextLengthError: its beginning has more.
            OptionError: as `encode`.
        """
        if len(text) <= LONG_TOKEN * max_tokens:
            return
        num_tokens = 0
        for stop in range(PIECE_CHARS, len(text) + PIECE_CHARS, PIECE_CHARS):
            num_tokens += len(self.encode(text[stop - PIECE_CHARS : stop], add_bos=False))
            # Cut in two, a word has a few tokens more than whole.
            if num_tokens > max_tokens + CUT_TOKENS * stop // PIECE_CHARS:
                raise ContextLengthError(
                    f"prompt has {len(text):,} characters, some {num_tokens:,} tokens in the first {stop:,} of them, "
                    f"expected fewer than {max_tokens:,} tokens in all; shorten it"
                )

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            OptionError: an id is not below `vocab_size`.
        """
        detokenizer = self.detokenizer(skip_special=skip_special)
        return "".join([detokenizer.add(token_id) for token_id in ids]) + detokenizer.finish()

    def detokenizer(self, *, skip_special: bool = False) -> StreamingDetokenizer:
        """A new detokenizer; what it returns, joined, is what `decode` returns for all ids."""
        return StreamingDetokenizer(self._vocabulary, skip_special=skip_special)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt for `messages` as text; see `ChatTemplate.render`.

        Raises:
            TemplateError: there is no chat template, or it cannot render these messages.
        """
        return self._template_for(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def apply_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> list[int]:
        """The prompt for `messages` as ids: `render`, then `encode` without adding BOS."""
        text = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, add_bos=False)

    def _template_for(self, tools: Sequence[Tool] | None) -> ChatTemplate:
        if not self._templates:
            raise TemplateError(
                "this checkpoint has no chat template, expected chat_template.jinja or a chat_template in "
                "tokenizer_config.json; give a raw prompt (a string) instead of messages"
            )
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(
                f"the chat templates are named {', '.join(sorted(self._templates))}, expected one named 'default'; "
                "rename one in the checkpoint"
            )
        return self._templates[name]

    def token_id(self, token: str) -> int | None:
        """The id of a token given as the string in the vocabulary, None when there is no such token."""
        _check_text(token)
        return self._vocabulary.token_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token within a text; half a character is possible, and b"" for an unused id.

        Raises:
            OptionError: the id is not below `vocab_size`.
        """
        return self._vocabulary.token_bytes(token_id)

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids of all control tokens."""
        return self._vocabulary.special_ids

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token such as `<|im_end|>`.

        Raises:
            OptionError: the id is not below `vocab_size`.
        """
        return self._vocabulary.is_special(token_id)


def load_tokenizer(
    folder: Path, *, config_eos_ids: Iterable[int] = (), model_vocab_size: int | None = None
) -> Tokenizer:
    """Read the tokenizer of a checkpoint folder: tokenizer.json, or tokenizer.model where that is all there is.

    Args:
        folder: the checkpoint's folder.
        config_eos_ids: the end-of-sequence ids of config.json; they become stop ids.
        model_vocab_size: rows of the model's embedding. Ids of rows beyond the tokenizer's last token have no text.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    files = read_tokenizer_files(folder)
    return Tokenizer(
        _read_vocabulary(folder, files),
        files,
        config_eos_ids=config_eos_ids,
        model_vocab_size=model_vocab_size or 0,
    )


def _read_vocabulary(folder: Path, files: TokenizerFiles) -> Vocabulary:
    if (folder / "tokenizer.json").exists():
        return JsonVocabulary(folder / "tokenizer.json", files)
    if (folder / "tokenizer.model").exists():
        return SentencePieceVocabulary(folder / "tokenizer.model", files)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor tokenizer.model, expected one of them; "
        "fetch the file from the original checkpoint"
    )


def _template_name(path: Path, name: str) -> str:
    return path.name if path.suffix == ".jinja" or name == "default" else f"{path.name} ({name})"


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise OptionError(f"text is a {type(text).__name__}, expected a string; decode bytes as UTF-8 first")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"text has a lone surrogate ({text[error.start]!r}) at character {error.start}, expected valid Unicode; "
            "replace it"
        ) from error


class _CheckedVocabulary:
    """A vocabulary that remembers the bytes of the ids it was asked for and refuses ids that do not exist."""

    def __init__(self, vocabulary: Vocabulary, model_vocab_size: int) -> None:
        self._vocabulary = vocabulary
        self.size = max(vocabulary.size, model_vocab_size)
        self.byte_errors: ByteErrors = vocabulary.byte_errors
        self.strips_all_opening_spaces = vocabulary.strips_all_opening_spaces
        self.special_ids = vocabulary.special_ids
        self.encode = vocabulary.encode
        self.token_id = vocabulary.token_id
        self.adds_bos = vocabulary.adds_bos
        # Filled as ids come up: a table of all 128,000 would cost every start a tenth of a second.
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._vocabulary.token_bytes(self._checked(token_id))
        return known

    def opening_bytes(self, token_id: int) -> bytes:
        return self._vocabulary.opening_bytes(self._checked(token_id))

    def is_special(self, token_id: int) -> bool:
        return self._vocabulary.is_special(self._checked(token_id))

    def _checked(self, token_id: SupportsIndex) -> int:
        try:
            index = operator.index(token_id)
        except TypeError:
            raise OptionError(f"token id is {token_id!r}, expected a whole number below {self.size}") from None
        if not 0 <= index < self.size:
            raise OptionError(
                f"token id is {index}, expected 0 to {self.size - 1}; the id belongs to another tokenizer"
            )
        return index
