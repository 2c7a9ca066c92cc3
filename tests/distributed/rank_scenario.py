"""What a model is asked on several ranks and on one, to be compared: run as a program, it is one of the ranks."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from lfm_mlx.cache import PrefixCache, Transcript
from lfm_mlx.engine import Engine, Request, Row, follow
from lfm_mlx.load import load
from lfm_mlx.model import Model
from lfm_mlx.types import FinishReason, SamplingParams

GREEDY = SamplingParams(temperature=0.0, seed=0)
WARM = SamplingParams(temperature=0.9, top_p=0.9, seed=5)


class Rules:
    """Forces two tokens, then allows even ones only, and ends the row at the eighth."""

    has_mask = True

    def __init__(self, vocab_size: int) -> None:
        self.num_seen = 0
        allowed = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        self.even = allowed + 0x55555555

    def forced(self) -> Sequence[int]:
        return [11, 13][self.num_seen :]

    def mask(self) -> Any:
        return self.even

    def observe(self, token_id: int) -> FinishReason | None:
        self.num_seen += 1
        return "stop" if self.num_seen == 8 else None


def ids(seed: int, count: int) -> list[int]:
    """Tokens of a prompt."""
    return [int(i) for i in np.random.default_rng(seed).integers(20, 90, count)]


def run(model: Model) -> dict[str, Any]:
    """Rows that come and go, are ruled, cancelled, drawn warm, and go on from what was computed before."""
    cache = PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 24, block_tokens=16)
    engine = Engine(model, max_rows=3, prefix_cache=cache)
    shared = ids(1, 40)
    rows = [
        engine.submit(Request(prompt=shared, sampling=GREEDY, max_tokens=10)),
        engine.submit(Request(prompt=ids(2, 7), sampling=WARM, max_tokens=6, top_logprobs=2)),
        engine.submit(Request(prompt=ids(3, 5), sampling=GREEDY, max_tokens=30, control=Rules(97))),
        engine.submit(Request(prompt=ids(4, 60), sampling=GREEDY, max_tokens=50)),
    ]
    while len(rows[3].generated) < 3:
        engine.step()
    rows[3].cancel()
    for limit_s in (None, 0.0):  # Both end before anything of them is decoded.
        rows.append(engine.submit(Request(prompt=ids(9, 8), sampling=GREEDY, max_tokens=3, time_limit_s=limit_s)))
    rows[4].cancel()
    rows.append(engine.submit(Request(prompt=[*shared, *ids(5, 4)], sampling=GREEDY, max_tokens=5)))
    finish(engine)
    # Of a cancelled row, how far it came depends on what was queued.
    told = [told_of(row) if row is not rows[3] else row.generated[:3] for row in rows]
    return {"rows": told, "turns": turns(model), "cached": [row.cached_tokens for row in rows]}


def turns(model: Model) -> list[Any]:
    """Two turns of a conversation, each with an engine of its own."""
    transcript, said, prompt = Transcript(model.new_state()), [], ids(6, 20)
    for seed in (7, 8):
        engine = Engine(model)
        request = Request(
            prompt=prompt, sampling=GREEDY, max_tokens=4, transcript=transcript, border_ids=frozenset({30})
        )
        row = engine.submit(request)
        finish(engine)
        said.append([*told_of(row), row.cached_tokens])
        prompt = [*prompt, *row.generated, *ids(seed, 5)]
    return said


def finish(engine: Engine) -> None:
    """Step until nothing is left."""
    while not engine.is_idle:
        engine.step()


def told_of(row: Row) -> list[Any]:
    """What a row came to."""
    return [row.generated, row.finish_reason, [one.token_id for one in row.logprobs]]


if __name__ == "__main__":
    loaded = load(sys.argv[1], **{f"{sys.argv[2]}_parallel": int(sys.argv[3])})
    if not follow(loaded.model):
        print(json.dumps(run(loaded.model)))
