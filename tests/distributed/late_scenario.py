"""Rank 0 ends with a sum on its way, or has threads that take turns; run as a program, it is one of the ranks."""

from __future__ import annotations

import sys
import threading
import time

import mlx.core as mx
from rank_scenario import GREEDY, ids

from lfm_mlx.distributed import join_ranks
from lfm_mlx.engine import Engine, Request, follow
from lfm_mlx.load import load
from lfm_mlx.model import Model


def leave_early() -> None:
    """Begin a sum, which the other rank begins later, and end; both tell when they do."""
    ranks = join_ranks(2, "tensor", {})
    if ranks.is_leader:
        mx.async_eval(ranks.group.sum(mx.ones(3)))
        ranks.link.close()
        print(time.monotonic())
    else:
        time.sleep(0.3)
        print(time.monotonic())
        mx.eval(ranks.group.sum(mx.ones(3)))
        ranks.link.wait_for_end()


def together(model: Model, *numbers: int) -> list[list[int]]:
    """What threads with an engine each answer at the same time."""
    found: dict[int, list[int]] = {}

    def answer(number: int) -> None:
        engine = Engine(model)
        row = engine.submit(Request(prompt=ids(number, 9), sampling=GREEDY, max_tokens=8))
        while not engine.is_idle:
            engine.step()
        found[number] = list(row.generated)

    threads = [threading.Thread(target=answer, args=(number,), daemon=True) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in numbers]


if __name__ == "__main__":
    if sys.argv[1:] == []:
        leave_early()
    else:
        loaded = load(sys.argv[1], tensor_parallel=2).model
        if not follow(loaded):
            assert together(loaded, 1, 2, 3) == [together(loaded, number)[0] for number in (1, 2, 3)]
