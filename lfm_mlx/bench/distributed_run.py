"""What do ranks really send and hold? Asked under `mlx.launch`; every rank runs this, and rank 0 reports."""

from __future__ import annotations

import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from lfm_mlx.bench.memory_use import process_peak_bytes
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.subject import Subject
from lfm_mlx.distributed import Ranks, ranks_of
from lfm_mlx.distributed.wire import Traffic, draw_traffic, layers_traffic, step_traffic
from lfm_mlx.model import Model
from lfm_mlx.step import stepper_of
from lfm_mlx.terminal import format_bytes

SENT_AT, RESENT_AT = 200, 208
"""Where Linux's tcp_info has the bytes that a connection sent, and those of them that it sent again."""


def ask_distributed_run(subject: Subject, *, prompt_len: int = 64, batch_size: int = 2, num_steps: int = 8) -> Report:
    """Load a model on all ranks, take prompts in, decode; compare bytes with the plan's.

    Args:
        subject: which model, on the ranks that were launched.
        prompt_len: tokens of each prompt, computed at once.
        batch_size: prompts.
        num_steps: tokens decoded behind them.
    """
    model, size = subject.to_hold(), subject.num_ranks
    ranks = ranks_of(model)
    assert ranks is not None
    stepper = stepper_of(model)
    tokens = mx.random.randint(0, model.config.vocab_size, (batch_size, prompt_len), key=mx.random.key(0))
    state = model.new_state(batch_size, kv_bits=subject.kv_bits)
    loaded_bytes = mx.get_peak_memory()
    phases, started = [], _Meter(ranks)
    logits = stepper.prefill(state, tokens, chunk_size=prompt_len)
    ids = ranks.share(mx.argmax(logits, axis=-1))
    mx.eval(ids)
    phases.append(("prompts", started.read(), _prompts_traffic(model, size, batch_size, prompt_len)))
    started = _Meter(ranks)
    for _ in range(num_steps):
        ids = ranks.share(mx.argmax(stepper.decode(state, ids), axis=-1))
        mx.eval(ids, state.arrays)
    step = step_traffic(model.config, size, batch_size=batch_size, item_bytes=model.dtype.size)
    planned = Traffic(num_collectives=num_steps * step.num_collectives, sent_bytes=num_steps * step.sent_bytes)
    phases.append(("decode", started.read(), planned))
    found = [
        {"phase": name, **measured, "planned_bytes": plan.sent_bytes, "collectives": plan.num_collectives}
        for name, measured, plan in phases
    ]
    memory = {
        "weight_bytes": model.num_bytes,
        "load_peak_bytes": loaded_bytes,
        "peak_bytes": mx.get_peak_memory(),
        "process_bytes": process_peak_bytes(),
    }
    peaks = ranks.group.gather(mx.array([mx.get_peak_memory(), process_peak_bytes()], dtype=mx.int64))
    held: Any = peaks.tolist()
    by_rank: list[dict[str, int]] = [{"peak_bytes": peak, "process_bytes": process} for peak, process in held]
    return Report(
        question="distributed",
        parameters={**subject.parameters, "prompt_len": prompt_len, "rows": batch_size},
        results={"phases": found, "rank 0": memory, "by_rank": by_rank},
        title=f"What ranks send and hold, {batch_size} x {prompt_len} tokens, then {num_steps} each, {subject.name}",
        header=["rank 0", "seconds", "collectives", "planned", "sent"],
        rows=[
            [
                one["phase"],
                one["seconds"],
                one["collectives"],
                format_bytes(one["planned_bytes"]),
                _told(one["sent_bytes"]),
            ]
            for one in found
        ],
        notes=[
            f"rank 0 holds {format_bytes(model.num_bytes)} of weights; MLX's peak: {format_bytes(loaded_bytes)} after "
            f"loading, {format_bytes(memory['peak_bytes'])} in all; process: {format_bytes(memory['process_bytes'])}.",
            f"process, rank by rank: {', '.join(format_bytes(one['process_bytes']) for one in by_rank)}.",
            "sent: by the connections of mlx.distributed, as Linux counts them; - where the system does not tell.",
        ],
    )


def _prompts_traffic(model: Model, size: int, batch_size: int, prompt_len: int) -> Traffic:
    options = {"item_bytes": model.dtype.size}
    layers = layers_traffic(model.config, size, num_tokens=batch_size * prompt_len, num_last=batch_size, **options)
    return layers + draw_traffic(model.config, size, batch_size=batch_size, **options)


class _Meter:
    """Seconds and bytes sent from its making on."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sent = sent_bytes(ranks)
        self._started_s = time.perf_counter()

    def read(self) -> dict[str, Any]:
        """Both, up to now."""
        seconds, sent = time.perf_counter() - self._started_s, sent_bytes(self._ranks)
        return {
            "seconds": seconds,
            "sent_bytes": sent - self._sent if sent is not None and self._sent is not None else None,
        }


def sent_bytes(ranks: Ranks) -> int | None:
    """Bytes of payload that this process has sent over TCP, the notes between ranks left out; None where unknown."""
    if not sys.platform.startswith("linux"):
        return None
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        number = int(entry.name)
        if number not in ranks.link.handles and _target(entry).startswith("socket:"):
            total += _sent_by(number)
    return total


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:  # Closed meanwhile: the listing's own.
        return ""


def _sent_by(number: int) -> int:
    connection = socket.socket(fileno=number)
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    finally:
        connection.detach()  # It belongs to mlx.distributed.
    sent, resent = (struct.unpack_from("<Q", info, at)[0] if len(info) >= at + 8 else 0 for at in (SENT_AT, RESENT_AT))
    return int(sent - resent)


def _told(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)
