"""What every rank but 0 does: mirror the engines of rank 0, step by step."""

from __future__ import annotations

from lfm_mlx.cache import PrefixCache, Transcript
from lfm_mlx.distributed import Note, ranks_of
from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.lockstep import FollowerStep
from lfm_mlx.model import Model


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
    while "end" not in (note := ranks.link.receive()):
        for number in note.get("gone_engines", ()):
            engines.pop(number, None)
        for number in note.get("gone_transcripts", ()):
            transcripts.pop(number, None)
        if "options" in note:
            step = FollowerStep(ranks, transcripts, model)
            engines[note["engine"]] = _engine(model, note["options"], step), step
        engine, step = engines[note["engine"]]
        step.note = note
        try:
            if "is_over" in note:
                step.end_rows(engine, note)
                engine.drop_ended()
            else:
                engine.step()
        except Exception as error:  # noqa: BLE001  # Whatever it is, the ranks are out of step.
            ranks.link.fail(error)
    return True


def _engine(model: Model, options: Note, step: FollowerStep) -> Engine:
    kv_bits, kept = options["kv_bits"], options["prefix_cache"]
    cache = PrefixCache(model.config, dtype=model.dtype, kv_bits=kv_bits, **kept) if kept is not None else None
    return Engine(model, max_rows=options["max_rows"], kv_bits=kv_bits, prefix_cache=cache, lockstep=step)
