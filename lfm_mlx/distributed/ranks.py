"""The processes of one run, connected: what a sharded model carries with it."""

from __future__ import annotations

import atexit
import hashlib
import signal
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from lfm_mlx.distributed.cut import Mode, RankPart
from lfm_mlx.distributed.link import BLAME_S, Link
from lfm_mlx.distributed.shard import Group, MlxGroup
from lfm_mlx.distributed.watch import STILL_S, Watch
from lfm_mlx.distributed.world import launched_world
from lfm_mlx.errors import LfmError, RankError
from lfm_mlx.memory import available_bytes
from lfm_mlx.model import Model


class Ranks:
    """This process among those that compute one model together.

    Args:
        link: to the others.
        group: what they compute with.
        part: which part of the model is here.
    """

    def __init__(self, link: Link, group: Group, part: RankPart) -> None:
        self.link = link
        self.group = group
        self.part = part

    @property
    def is_leader(self) -> bool:
        """Whether this is rank 0, which speaks to the user and decides what is computed."""
        return self.part.rank == 0

    def share(self, ids: mx.array) -> mx.array:
        """Rank 0's token ids, on every rank; unevaluated."""
        # Multiplied, not replaced by zeros: what the others drew is computed, and with it the logits that all gather.
        return self.group.sum(ids if self.is_leader else ids * 0)


def join_ranks(size: int, mode: Mode, facts: Mapping[str, object]) -> Ranks:
    """Connect this process with the others that were launched with it.

    Args:
        size: how many the user said there are.
        mode: how the model is to be cut.
        facts: what has to be alike on all ranks beside versions.

    Raises:
        OptionError: another number was launched, or none.
        RankError: a rank did not come, or is not like the others.
    """
    link = join_link(size, mode)
    agree(link, mode, facts)
    # While `init` connects, no other thread of this process runs.
    world = link.world
    try:
        group = MlxGroup(mx.distributed.init(strict=True, backend=world.backend))
    except RuntimeError as error:
        raise RankError(f"mlx.distributed did not connect rank {world.rank}: {error}; start all ranks again") from error
    link.on_close = group.finish
    return Ranks(link, group, RankPart(rank=world.rank, size=size, mode=mode))


def join_link(size: int, mode: str) -> Link:
    """Connect this process with the others that were launched with it, without `mlx.distributed`.

    Args:
        size: how many the user said there are.
        mode: "tensor", "expert" or "data", what they are to do in parallel.

    Raises:
        OptionError: another number was launched, or none.
        RankError: a rank did not come.
    """
    world = launched_world(size, mode)
    still = f"error: rank 0 stood still for {STILL_S} s, waiting for another one; all ranks end, start them again\n"
    watch = Watch(still if world.rank == 0 else "")  # Also while others are waited for.
    try:
        link = Link(world, watch=watch)
    except LfmError:
        watch.close()
        raise
    if link.is_leader:
        atexit.register(link.close)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _leave)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Rank 0 decides what an interruption ends.
    return link


def agree(link: Link, mode: str, facts: Mapping[str, object]) -> None:
    """Compare what all ranks have to have alike: versions, mode and these facts; all of them call it.

    Raises:
        RankError: one has something else.
    """
    own = {"code of lfm_mlx": code_hash(), "mlx": version("mlx"), "parallel": f"{mode} {link.world.size}"}
    link.agree({**own, **facts})


def code_hash() -> str:
    """A hash of this package's source, 12 hexadecimal digits: versions tell less while somebody works on it."""
    digest = hashlib.blake2b(digest_size=6)
    folder = Path(__file__).resolve().parents[1]
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def ranks_of(model: Model) -> Ranks | None:
    """The ranks that a sharded model runs on; None for a model that is whole."""
    found = vars(model).get("_ranks")
    assert found is None or isinstance(found, Ranks)
    return found


def part_name(model: Model) -> str:
    """The name of the part of a model that is here; "" for a model that is whole."""
    ranks = ranks_of(model)
    return "" if ranks is None else ranks.part.name


def free_bytes(model: Model) -> int:
    """Bytes that may still be allocated where a model is: on every rank, where there are several."""
    ranks = ranks_of(model)
    return available_bytes() if ranks is None else ranks.link.free_bytes


def set_ranks(model: Model, ranks: Ranks) -> None:
    """Let a sharded model carry its ranks with it."""
    object.__setattr__(model, "_ranks", ranks)


def _leave(number: int, frame: object) -> None:
    """On SIGTERM: a launcher that sees a rank die ends the others, and which one it was is to be told first."""
    time.sleep(BLAME_S)
    sys.exit(128 + number)
