"""Which prompts a server was sent, approximately: what its prefix cache is likely to hold."""

from __future__ import annotations

from collections import OrderedDict

from lfm_mlx.replicas.prompt_trace import PromptTrace

MAX_PIECES = 1 << 15
"""About 30 million characters, more than a prefix cache of a few gigabytes holds."""


class PrefixIndex:
    """The pieces of the latest prompts; the longest unused are forgotten first.

    Args:
        max_pieces: most that are kept.
    """

    def __init__(self, max_pieces: int = MAX_PIECES) -> None:
        self._max_pieces = max_pieces
        self._pieces: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pieces)

    def match(self, trace: PromptTrace) -> int:
        """Characters from the beginning of a prompt that were sent before."""
        found = 0
        for piece, end in zip(trace.hashes, trace.ends, strict=True):
            if piece not in self._pieces:
                break
            found = end
        return found

    def add(self, trace: PromptTrace) -> None:
        """Remember a prompt; its beginning, which others share, is forgotten after its end."""
        for piece in reversed(trace.hashes):
            self._pieces[piece] = None
            self._pieces.move_to_end(piece)
        while len(self._pieces) > self._max_pieces:
            self._pieces.popitem(last=False)

    def clear(self) -> None:
        """Forget all: the server was started again."""
        self._pieces.clear()
