"""One prefix cache on several ranks: each keeps the blocks of its part, and all of them restore equally much.

In memory the ranks have the same blocks, because they do the same in the same order. On their disks they may not: a
file may be damaged or missing on one of them. So where there are disks, the ranks tell each other what they have before
a row goes on from it, and then whether they could read it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from lfm_mlx.cache import DiskStore, PrefixCache, Reading
from lfm_mlx.distributed import Link, Note, part_name
from lfm_mlx.errors import OptionError
from lfm_mlx.model import Model


class PendingReading(Protocol):
    """Blocks on their way from the disk to memory."""

    @property
    def is_done(self) -> bool:
        """Whether all has come."""
        ...

    def call_when_done(self, on_done: Callable[[], None]) -> None:
        """Call back, from another thread, whenever something has come."""
        ...


class CacheUse(Protocol):
    """What is done with a prefix cache between steps."""

    def begin_reading(self, cache: PrefixCache, ids: Sequence[int]) -> PendingReading | None:
        """As `PrefixCache.begin_restore`."""
        ...

    def finish_reading(self, cache: PrefixCache, reading: PendingReading) -> None:
        """As `PrefixCache.finish_reading`."""
        ...

    def settle(self, cache: PrefixCache) -> None:
        """As `PrefixCache.settle`."""
        ...


class LoneCacheUse:
    """The `CacheUse` that concerns this process alone."""

    def begin_reading(self, cache: PrefixCache, ids: Sequence[int]) -> PendingReading | None:
        """As `CacheUse.begin_reading`."""
        return cache.begin_restore(ids)

    def finish_reading(self, cache: PrefixCache, reading: PendingReading) -> None:
        """As `CacheUse.finish_reading`."""
        assert isinstance(reading, Reading)
        cache.finish_reading(reading)

    def settle(self, cache: PrefixCache) -> None:
        """As `CacheUse.settle`."""
        cache.settle()


class SharedReading:
    """What rank 0 reads, done when all ranks have theirs.

    Args:
        number: of it, on all ranks.
        own: rank 0's part.
        link: to the others, which have not been asked to read yet.
    """

    def __init__(self, number: int, own: Reading, link: Link) -> None:
        self.number = number
        self.own = own
        self._are_others_done = False
        self._on_done: Callable[[], None] | None = None
        link.call_when_ready(number, self._note_others)

    def _note_others(self) -> None:
        self._are_others_done = True
        if self._on_done is not None:
            self._on_done()

    @property
    def is_done(self) -> bool:
        """As `PendingReading.is_done`."""
        return self._are_others_done and self.own.is_done

    def call_when_done(self, on_done: Callable[[], None]) -> None:
        """As `PendingReading.call_when_done`; the caller looks at `is_done` once more afterwards."""
        self._on_done = on_done
        self.own.call_when_done(on_done)


class LeaderCompany:
    """Rank 0's `lfm_mlx.cache.Company`: decides, by what it hears."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def common_length(self, lengths: Collection[int]) -> int:
        """As `Company.common_length`."""
        common = max(set(lengths).intersection(*self._link.hear("lengths")), default=0)
        self._link.send({"common": common})
        return common

    def have_all(self, is_here: bool) -> bool:
        """As `Company.have_all`."""
        have_all = all([is_here, *self._link.hear("has")])
        self._link.send({"have_all": have_all})
        return have_all


class FollowerCompany:
    """Another rank's `lfm_mlx.cache.Company`: tells, and does what rank 0 decides."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def common_length(self, lengths: Collection[int]) -> int:
        """As `Company.common_length`."""
        self._link.tell({"lengths": list(lengths)})
        return int(self._link.expect("common"))

    def have_all(self, is_here: bool) -> bool:
        """As `Company.have_all`."""
        self._link.tell({"has": is_here})
        return bool(self._link.expect("have_all"))


class FollowedReadings:
    """What a rank other than 0 reads because rank 0 asked for it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._readings: dict[int, Reading] = {}

    def work(self, cache: PrefixCache, note: Note) -> None:
        """Do with `cache` what a note says."""
        number = note.get("number", 0)
        if note["cache"] == "settle":
            cache.settle()
        elif note["cache"] == "read":
            self._begin(cache, number, note["ids"])
        elif number in self._readings:
            cache.finish_reading(self._readings.pop(number))

    def _begin(self, cache: PrefixCache, number: int, ids: Sequence[int]) -> None:
        reading = cache.begin_restore(ids)
        if reading is None:
            self._link.tell_ready(number)
            return
        self._readings[number] = reading
        reading.call_when_done(partial(self._tell_if_done, number, reading))

    def _tell_if_done(self, number: int, reading: Reading) -> None:
        if reading.is_done:
            self._link.tell_ready(number)


def described_cache(cache: PrefixCache, model: Model) -> Note:
    """What another rank needs to know to make its own.

    Raises:
        OptionError: the disk is not that of this rank's part.
    """
    note: Note = {"max_bytes": cache.max_bytes, "block_tokens": cache.block_tokens}
    if cache.disk is None:
        return note
    if cache.disk.part != part_name(model):
        raise OptionError(
            f"the prefix cache's disk is for the part {cache.disk.part!r}, expected {part_name(model)!r}; make the "
            "DiskStore with part=part_name(model)"
        )
    disk = {"folder": str(cache.disk.folder), "max_bytes": cache.disk.max_bytes, "fingerprint": cache.disk.fingerprint}
    return {**note, "disk": disk}


def followed_cache(note: Note, model: Model, kv_bits: int | None, link: Link) -> PrefixCache:
    """Another rank's cache, as rank 0 described its own.

    Raises:
        OptionError: its folder cannot be made here.
    """
    disk = None
    if "disk" in note:
        kept = {**note["disk"], "folder": Path(note["disk"]["folder"])}
        disk = DiskStore(**kept, part=part_name(model))
    sizes = {name: note[name] for name in ("max_bytes", "block_tokens")}
    cache = PrefixCache(model.config, dtype=model.dtype, kv_bits=kv_bits, disk=disk, **sizes)
    if disk is not None:
        cache.company = FollowerCompany(link)
    return cache
