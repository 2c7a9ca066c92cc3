"""An answer as a sequence of blocks: reasoning, text, calls, in the order in which the model wrote them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from lfm_mlx.types import ContentDelta, OutputEvent, ReasoningDelta, ToolCall, ToolCallDone

BlockKind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """One block, growing while it is written.

    Args:
        kind: what it is.
        index: its place in the answer.
        text: the text so far; of a call, its arguments as JSON.
        call: of a call.
    """

    kind: BlockKind
    index: int
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True, kw_only=True)
class BlockStep:
    """A block begins, grows by some text, or ends."""

    step: Literal["start", "delta", "stop"]
    block: Block
    text: str = ""


class BlockWriter:
    """Groups events into blocks; a block of white space alone is none.

    Attributes:
        blocks: those so far.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._held = ""
        self._held_kind: BlockKind | None = None

    @property
    def has_calls(self) -> bool:
        """Whether there is a call among the blocks."""
        return any(block.kind == "call" for block in self.blocks)

    def feed(self, events: Iterable[OutputEvent]) -> Iterator[BlockStep]:
        """What happens to the blocks with these events."""
        for event in events:
            if isinstance(event, ReasoningDelta):
                yield from self._add("reasoning", event.text)
            elif isinstance(event, ContentDelta):
                yield from self._add("text", event.text)
            elif isinstance(event, ToolCallDone):
                yield from self.finish()
                yield from self._begin("call", event.call)
                yield from self._grow(event.call.arguments_json)
                yield from self.finish()

    def finish(self) -> Iterator[BlockStep]:
        """The block that is open ends."""
        self._held, self._held_kind = "", None
        if self._open is not None:
            block, self._open = self._open, None
            yield BlockStep(step="stop", block=block)

    def _add(self, kind: BlockKind, text: str) -> Iterator[BlockStep]:
        if self._open is not None and self._open.kind != kind:
            yield from self.finish()
        if self._held_kind not in (None, kind):
            self._held = ""
        if self._open is None:
            self._held, self._held_kind = self._held + text, kind
            if not self._held.strip():
                return
            text, self._held, self._held_kind = self._held, "", None
            yield from self._begin(kind)
        yield from self._grow(text)

    def _begin(self, kind: BlockKind, call: ToolCall | None = None) -> Iterator[BlockStep]:
        self._open = Block(kind, len(self.blocks), call=call)
        self.blocks.append(self._open)
        yield BlockStep(step="start", block=self._open)

    def _grow(self, text: str) -> Iterator[BlockStep]:
        assert self._open is not None
        if text:
            self._open.text += text
            yield BlockStep(step="delta", block=self._open, text=text)
