"""What every rank but 0 does: mirror the engines of rank 0, step by step."""

from __future__ import annotations

from lfm_mlx.cache import PrefixCache, Transcript
from lfm_mlx.distributed import Note, ranks_of
from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.lockstep import FollowerStep
from lfm_mlx.engine.shared_prefix import followed_cache
from lfm_mlx.model import Model

CLOSE_S = 5.0
"""In which what is still to be written to the disk has to be, at the end."""


def follow(model: Model) -> bool:
    """On rank 0, and for a whole model, do nothing; on any other rank, compute what rank 0 computes until it ends.

    Args:
        model: from `lfm_mlx.load`.

    Returns:
        Whether this rank has followed, so that nothing is left for it to do.
    """
    ranks = ranks_of(model)
    if ranks is None or ranks.is_leader:
        return False
    engines: dict[int, tuple[Engine, FollowerStep]] = {}
    transcripts: dict[int, Transcript] = {}
    caches: dict[int, PrefixCache] = {}
    while "end" not in (note := ranks.link.receive()):
        for number in note.get("gone_engines", ()):
            engines.pop(number, None)
        for number in note.get("gone_transcripts", ()):
            transcripts.pop(number, None)
        for number in note.get("gone_caches", ()):
            if number in caches:
                caches.pop(number).close(CLOSE_S)
        try:
            if "options" in note:
                step = FollowerStep(ranks, transcripts, model)
                engines[note["engine"]] = _engine(model, note["options"], step, caches), step
            _follow_note(*engines[note["engine"]], note)
        except Exception as error:  # noqa: BLE001  # Whatever it is, the ranks are out of step.
            ranks.link.fail(error)
    ranks.link.close()  # Rank 0 may end at once, and files may have to be written.
    for cache in caches.values():
        cache.close(CLOSE_S)
    return True


def _follow_note(engine: Engine, step: FollowerStep, note: Note) -> None:
    if "is_over" in note:
        step.end_rows(engine, note)
        engine.drop_ended()
    elif "cache" in note:
        assert engine.prefix_cache is not None
        step.readings.work(engine.prefix_cache, note)
    else:
        step.note = note
        engine.step()


def _engine(model: Model, options: Note, step: FollowerStep, caches: dict[int, PrefixCache]) -> Engine:
    kv_bits, number = options["kv_bits"], options["cache_number"]
    if number is not None and number not in caches:
        caches[number] = followed_cache(options["prefix_cache"], model, kv_bits, step.ranks.link)
    cache = caches[number] if number is not None else None
    return Engine(model, max_rows=options["max_rows"], kv_bits=kv_bits, prefix_cache=cache, lockstep=step)
