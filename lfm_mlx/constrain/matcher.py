"""One row's way through its constraint: which tokens may come next, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from llguidance import LLMatcher

from lfm_mlx.constrain.constraint import Constraint, ToolCalls
from lfm_mlx.constrain.free_text import FreeText
from lfm_mlx.constrain.grammar_tokenizer import GrammarTokenizer, Mask
from lfm_mlx.constrain.reason import one_line
from lfm_mlx.errors import LfmError, OptionError
from lfm_mlx.tokenizer import special

# The longest marker is shorter than this; more of the text is not needed to see one coming.
_NUM_LATEST = 24


@dataclass(kw_only=True)
class _Part:
    """A part of the answer, from the `start`-th token on: free text, or a grammar that has read `num_read` tokens."""

    start: int
    is_reasoning: bool = False
    free: FreeText | None = None
    grammar: LLMatcher | None = None
    num_read: int = 0


class Matcher:
    """Follows one answer through a constraint. Not for two threads at a time.

    An answer is a row of parts: reasoning and text, which are free and cost nothing, and grammars.

    Args:
        constraint: what the answer must be.
        tokenizer: from `grammar_tokenizer`.
        is_in_reasoning: whether the prompt has already opened `<think>`.

    Attributes:
        constraint: as given.

    Raises:
        OptionError: the vocabulary lacks a marker that the constraint needs, or the grammar is refused.
    """

    def __init__(self, constraint: Constraint, tokenizer: GrammarTokenizer, *, is_in_reasoning: bool = False) -> None:
        self.constraint = constraint
        self._tokenizer = tokenizer
        self._think_start = tokenizer.marker(special.THINK_START)
        self._think_end = tokenizer.marker(special.THINK_END)
        self._call_start = tokenizer.marker(special.TOOL_CALL_START)
        self._ids: list[int] = []
        self._is_stopped = False
        self._row = np.zeros(tokenizer.num_words, dtype=np.uint32)
        self._grammar = self._compile()
        self._parts = [self._first_part(is_in_reasoning)]
        self._may_open = constraint.reasoning == "optional" and not is_in_reasoning and self._can_reason

    def _compile(self) -> LLMatcher | None:
        """The grammar before its first token, made at once: no step in the middle waits for it."""
        if isinstance(self.constraint, ToolCalls) and not self.constraint.allows_calls:
            return None
        return self._tokenizer.compile(self.constraint.grammar(self._tokenizer))

    @property
    def _can_reason(self) -> bool:
        return self._think_start is not None and self._think_end is not None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._tokenizer.vocab_size

    @property
    def num_tokens(self) -> int:
        """How many tokens were accepted."""
        return len(self._ids)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop token came, or nothing else can come."""
        grammar = self._parts[-1].grammar
        return self._is_stopped or (grammar is not None and grammar.is_stopped())

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here. One that ends where this is False was cut off inside a structure."""
        part = self._parts[-1]
        if part.grammar is not None:
            return part.grammar.is_accepting()
        return self._is_stopped or not part.is_reasoning

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning or ends it."""
        return self._parts[-1].is_reasoning

    @property
    def is_free(self) -> bool:
        """Whether no grammar has a say in the next token: the mask is a constant that costs nothing.

        A step may run ahead with the same mask; what it drew is checked with `allows` before `accept`.
        """
        return self._parts[-1].free is not None and not self._is_stopped

    def mask(self) -> Mask:
        """The tokens that may come next, packed. Not to be written to, and valid until the next call.

        Where the grammar leaves one text, only the pieces are allowed that the tokenizer itself would cut it into.

        Raises:
            OptionError: the grammar became too complex to follow.
        """
        part, row = self._parts[-1], self._row
        extra_ids = self._extra_ids()
        if self._is_stopped:
            row[:] = self._tokenizer.pack(self._tokenizer.stop_ids)
        elif part.free is not None:
            free = part.free.mask(self._latest(part))
            if not extra_ids:
                return free
            row[:] = free
        elif part.grammar is not None:
            part.grammar.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            _check_alive(part.grammar)
        for token_id in extra_ids:
            row[token_id // 32] |= np.uint32(1 << token_id % 32)
        return row

    def allows(self, token_id: int) -> bool:
        """Whether the mask has the token."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return False
        return bool(self.mask()[token_id // 32] >> np.uint32(token_id % 32) & np.uint32(1))

    def accept(self, token_id: int) -> None:
        """Go on by one token that was drawn under the mask, or one that spells what the mask allows in smaller pieces.

        Raises:
            OptionError: the token is not possible here; nothing has changed then.
        """
        if self._is_stopped:
            self._refuse(token_id)
        part = self._parts[-1]
        if token_id in self._extra_ids():
            self._ids.append(token_id)
            opens = token_id == self._think_start
            # After a blank line the same grammar goes on, still before its first token.
            self._parts.append(self._reasoning_part() if opens else replace(part, start=len(self._ids)))
        elif part.grammar is not None:
            self._accept_structured(part, part.grammar, token_id)
        else:
            self._accept_free(token_id)

    def _accept_free(self, token_id: int) -> None:
        if not self.allows(token_id):
            self._refuse(token_id)
        self._ids.append(token_id)
        if token_id in self._tokenizer.stop_ids:
            self._is_stopped = True
        elif token_id == self._think_start:
            self._parts.append(self._reasoning_part())
        elif token_id == self._think_end:
            self._parts.append(self._answer_part())
        elif token_id == self._call_start:
            self._parts.append(self._structured_part())

    def _accept_structured(self, part: _Part, grammar: LLMatcher, token_id: int) -> None:
        if token_id in self._tokenizer.stop_ids:
            if not grammar.is_accepting():
                self._refuse(token_id)
            self._is_stopped = True
            self._ids.append(token_id)
            return
        if not 0 <= token_id < self._tokenizer.vocab_size or grammar.try_consume_tokens([token_id]) != 1:
            _check_alive(grammar)
            self._refuse(token_id)
        self._ids.append(token_id)
        part.num_read += 1
        if self.constraint.is_lazy and grammar.is_stopped():
            self._parts.append(self._text_part())

    def forced(self) -> list[int]:
        """The next tokens where there is no choice, as the tokenizer would write them; [] where there is one.

        They can be appended without running the model for each, and are to be accepted like others.
        """
        part = self._parts[-1]
        if self._is_stopped or self._extra_ids():
            return []
        if part.free is not None:
            exits = part.free.exits
            return list(exits) if not part.free.has_text and len(exits) == 1 else []
        if part.grammar is None or part.grammar.is_accepting():
            return []
        ids = part.grammar.compute_ff_tokens()
        return ids[: part.grammar.validate_tokens(ids)]

    def rollback(self, num_tokens: int) -> None:
        """Forget the latest tokens.

        Raises:
            OptionError: fewer tokens were accepted.
        """
        if not 0 <= num_tokens <= len(self._ids):
            raise OptionError(f"num_tokens is {num_tokens}, expected 0 to {len(self._ids)}, the tokens accepted so far")
        if num_tokens and self._is_stopped:
            self._is_stopped = False
            self._ids.pop()
            num_tokens -= 1
        del self._ids[len(self._ids) - num_tokens :]
        while self._parts[-1].start > len(self._ids):
            self._parts.pop()
        part = self._parts[-1]
        num_kept = len(self._ids) - part.start
        if part.grammar is not None and part.num_read > num_kept:
            if not part.grammar.rollback(part.num_read - num_kept):
                raise LfmError(f"the grammar cannot go back: {_reason(part.grammar)}; start a new matcher")
            part.num_read = num_kept

    def copy(self) -> Matcher:
        """A matcher that goes on from here on its own."""
        other = object.__new__(Matcher)
        other.__dict__.update(self.__dict__)
        other._ids = list(self._ids)
        other._row = self._row.copy()
        other._parts = [replace(part, grammar=part.grammar and part.grammar.deep_copy()) for part in self._parts]
        return other

    def _first_part(self, is_in_reasoning: bool) -> _Part:
        reasoning = self.constraint.reasoning
        if not self._can_reason and (reasoning == "required" or is_in_reasoning):
            raise OptionError(
                "the tokenizer has no <think> and </think>, expected them for reasoning; set reasoning to 'forbidden'"
            )
        if is_in_reasoning and reasoning != "forbidden":
            return self._reasoning_part()
        if is_in_reasoning or reasoning == "required":
            marker = self._think_end if is_in_reasoning else self._think_start
            return self._free_part([marker], has_text=False, is_reasoning=True)
        return self._answer_part()

    def _reasoning_part(self) -> _Part:
        return self._free_part([self._think_end], is_reasoning=True)

    def _answer_part(self) -> _Part:
        return self._text_part() if self.constraint.is_lazy else self._structured_part()

    def _text_part(self) -> _Part:
        has_called = any(part.grammar is not None for part in self._parts) if self._ids else False
        exits: list[int | None] = list(self._tokenizer.stop_ids)
        constraint = self.constraint
        if isinstance(constraint, ToolCalls) and constraint.allows_calls and (constraint.is_parallel or not has_called):
            exits.append(self._call_start)
        return self._free_part(exits)

    def _free_part(self, exits: Sequence[int | None], *, has_text: bool = True, is_reasoning: bool = False) -> _Part:
        known = [token_id for token_id in exits if token_id is not None]
        free = FreeText(self._tokenizer, known, has_text=has_text)
        return _Part(start=len(self._ids), free=free, is_reasoning=is_reasoning)

    def _structured_part(self) -> _Part:
        assert self._grammar is not None
        return _Part(start=len(self._ids), grammar=self._grammar.deep_copy())

    def _extra_ids(self) -> Sequence[int]:
        """What may come next beside what the part itself allows."""
        if not self._ids:
            return [self._think_start] if self._may_open and self._think_start is not None else []
        if self._ids[-1] == self._think_end and self.constraint.allows_blank_lines and not self.is_free:
            return self._tokenizer.blank_line_ids
        return []

    def _latest(self, part: _Part) -> list[int]:
        return self._ids[max(part.start, len(self._ids) - _NUM_LATEST) :]

    def _refuse(self, token_id: int) -> NoReturn:
        text = self._tokenizer.token_bytes[token_id] if 0 <= token_id < self._tokenizer.vocab_size else b""
        raise OptionError(
            f"token {token_id} ({text!r}) is not allowed after {len(self._ids)} tokens of the answer, expected one "
            "that the mask allows; draw with the mask of the same step"
        )


def _check_alive(grammar: LLMatcher) -> None:
    if grammar.is_stopped() and not grammar.is_accepting():
        raise OptionError(f"the grammar cannot be followed any further: {_reason(grammar)}; simplify the constraint")


def _reason(grammar: LLMatcher) -> str:
    return one_line(grammar.get_error()) or "nothing can follow"
