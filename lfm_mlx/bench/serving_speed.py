"""How soon and how evenly does a server answer, how much does it write, and what do prefixes and long prompts do?"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lfm_mlx.bench.report import Report
from lfm_mlx.bench.served_prompts import Prompts, after_call
from lfm_mlx.bench.served_side import ServedSide, serve_both
from lfm_mlx.bench.served_stream import Heard, ask, ask_all
from lfm_mlx.bench.subject import Subject
from lfm_mlx.config import read_config
from lfm_mlx.tokenizer import load_tokenizer

CLIENTS = (1, 2, 4, 8, 16, 32)
ROUNDS = 2
PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
PREFIX_TOKENS = 1024
LONG_TOKENS = 30_000
STREAMS = 4
SETTLE_S = 3.0
"""Seconds for which streams run undisturbed before a long prompt comes."""


def ask_serving(
    subject: Subject,
    *,
    clients: Sequence[int] = CLIENTS,
    rounds: int = ROUNDS,
    prompt_tokens: int = PROMPT_TOKENS,
    answer_tokens: int = ANSWER_TOKENS,
    prefix_tokens: int = PREFIX_TOKENS,
    long_tokens: int | None = None,
    options: Sequence[str] = (),
) -> Report:
    """Start servers on a checkpoint and ask them the same things, taking turns; only one of them works at a time.

    Args:
        subject: a checkpoint, and whether mlx-lm's server is asked too; of several ranks, this process is 0.
        clients: numbers of clients that ask at once, each a new question when it has its answer.
        rounds: questions of each client; repeats of the questions about prefixes.
        prompt_tokens: of a question.
        answer_tokens: of its answer.
        prefix_tokens: of what conversations share.
        long_tokens: of a prompt that comes while others read; None takes 30,000, or what the context has room for.
        options: further ones of the server.
    """
    folder, has_peer = subject.folder, subject.peer
    context = read_config(folder).max_context
    long = long_tokens or min(LONG_TOKENS, context // 2)
    prompts = Prompts(load_tokenizer(folder))
    with serve_both(str(folder), subject, options) as sides:
        for side in sides:
            _warm_up(side, prompts, max(clients), answer_tokens)
        loads = [_load(sides, prompts, number, rounds, prompt_tokens, answer_tokens) for number in clients]
        prefixes = _prefixes(sides, prompts, prefix_tokens, rounds)
        disturbed = {side.name: _disturb(side, prompts, long, context) for side in sides}
    names = [side.name for side in sides]
    return Report(
        question="serving",
        parameters={
            **subject.parameters,
            "clients": list(clients),
            "rounds": rounds,
            "prompt_tokens": prompt_tokens,
            "answer_tokens": answer_tokens,
            "prefix_tokens": prefix_tokens,
            "long_tokens": long,
            "options": list(options),
        },
        results={"load": loads, "first_token_ms": prefixes, "long_prompt": disturbed},
        title=f"Serving, {subject.name}",
        header=["", *names, *(["ratio"] if has_peer else [])],
        rows=list(_table(loads, prefixes, disturbed, names)),
        notes=(
            "gap: between two pieces of a stream, as a client hears them. ratio: lfm_mlx's share of mlx-lm's number.",
            f"questions of {prompt_tokens} tokens, answers of {answer_tokens}; prefixes of {prefix_tokens}; the long",
            f"prompt has {long:,} tokens and comes while {STREAMS} streams are read. A connection that is reset before",
            "its answer begins is made again; the time counts.",
        ),
    )


def _warm_up(side: ServedSide, prompts: Prompts, num_clients: int, answer_tokens: int) -> None:
    for number in sorted({1, num_clients}):
        bodies = [{**prompts.request(64, min(answer_tokens, 16)), **side.fields} for _ in range(number)]
        ask_all(side.port, bodies, number)


def _load(
    sides: Sequence[ServedSide], prompts: Prompts, number: int, rounds: int, prompt_tokens: int, answer_tokens: int
) -> dict[str, Any]:
    """So many clients at once: what they hear, and tokens/s of all of them together."""
    asked = [prompts.request(prompt_tokens, answer_tokens) for _ in range(number * rounds)]
    case: dict[str, Any] = {"clients": number}
    for side in sides:
        started_s = time.perf_counter()
        heard = ask_all(side.port, [{**body, **side.fields} for body in asked], number)
        seconds = time.perf_counter() - started_s
        tokens = sum(one.completion_tokens for one in heard)
        case[side.name] = {
            "tokens_per_s": round(tokens / seconds, 2),
            "completion_tokens": tokens,
            "prompt_tokens": sum(one.prompt_tokens for one in heard),
            "first_token_ms": _spread([one.first_s for one in heard]),
            "gap_ms": _spread([gap for one in heard for gap in one.gaps_s]),
        }
    return case


def _prefixes(sides: Sequence[ServedSide], prompts: Prompts, prefix_tokens: int, repeats: int) -> dict[str, Any]:
    """Milliseconds to the first token where nothing, a system message, a whole prompt or a turn was seen before."""
    found: dict[str, dict[str, list[Heard]]] = {}
    for _ in range(repeats):
        system = prompts.text(prefix_tokens)
        first, second = prompts.after_system(system, 8), prompts.after_system(system, 8)
        turn = prompts.tool_turn(prefix_tokens)
        for side in sides:
            heard = {
                "cold": ask(side.port, {**first, **side.fields}),
                "shared system message": ask(side.port, {**second, **side.fields}),
                "the same again": ask(side.port, {**first, **side.fields}),
                "tools, first turn": ask(side.port, {**turn, **side.fields}),
            }
            following = after_call(turn, heard["tools, first turn"].message)
            heard["tools, second turn"] = ask(side.port, {**following, **side.fields})
            for kind, one in heard.items():
                found.setdefault(kind, {}).setdefault(side.name, []).append(one)
    return {
        kind: {
            name: {
                "median": round(statistics.median(one.first_s for one in heard) * 1e3, 2),
                "prompt_tokens": heard[-1].prompt_tokens,
                "cached_tokens": heard[-1].cached_tokens,
            }
            for name, heard in by_side.items()
        }
        for kind, by_side in found.items()
    }


def _disturb(side: ServedSide, prompts: Prompts, long_tokens: int, context: int) -> dict[str, Any]:
    """Gaps of running streams before a long prompt comes, and while it is taken in."""
    is_over = threading.Event()
    answer_tokens = max(context // 2, 1)
    bodies = [{**prompts.request(32, answer_tokens), **side.fields} for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as readers:
        reading = [readers.submit(ask, side.port, body, until=is_over) for body in bodies]
        try:
            time.sleep(SETTLE_S)
            long = ask(side.port, {**prompts.request(long_tokens, 1), **side.fields})
        finally:
            is_over.set()
        streams = [one.result() for one in reading]
    first_s = long.times_s[0] if long.times_s else time.perf_counter()
    calm = _gaps_between(streams, long.asked_s - SETTLE_S * 0.8, long.asked_s)
    disturbed = _gaps_between(streams, long.asked_s, first_s)
    case: dict[str, Any] = {
        "prompt_tokens": long.prompt_tokens,
        "first_token_ms": round((first_s - long.asked_s) * 1e3, 1),
        "calm_gap_ms": _spread(calm),
        "disturbed_gap_ms": _spread(disturbed),
    }
    ratio = case["disturbed_gap_ms"]["p95"] / case["calm_gap_ms"]["p95"] if calm and disturbed else None
    return {**case, "p95_ratio": round(ratio, 3) if ratio else None}


def _gaps_between(streams: Sequence[Heard], start_s: float, end_s: float) -> list[float]:
    """Gaps that ended in a span of time."""
    return [
        gap
        for stream in streams
        for time_s, gap in zip(stream.times_s[1:], stream.gaps_s, strict=True)
        if start_s < time_s <= end_s
    ]


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile in milliseconds; nothing where there is nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in _SHARES.items()}
    return {name: round(value * 1e3, 3) for name, value in at.items()}


_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


def _table(
    loads: Sequence[Mapping[str, Any]],
    prefixes: Mapping[str, Any],
    disturbed: Mapping[str, Any],
    names: Sequence[str],
) -> Sequence[Sequence[object]]:
    rows: list[list[object]] = []

    def add(label: str, values: Sequence[Any]) -> None:
        ratio = [values[0] / values[1]] if len(values) == 2 and all(values) else [None] * (len(values) - 1)
        rows.append([label, *values, *ratio])

    for case in loads:
        number = case["clients"]
        add(f"tokens/s, {number} clients", [case[name]["tokens_per_s"] for name in names])
        add("  first token p50, ms", [case[name]["first_token_ms"]["p50"] for name in names])
        for share in _SHARES:
            add(f"  gap {share}, ms", [case[name]["gap_ms"].get(share) for name in names])
    for kind, by_side in prefixes.items():
        add(f"first token, {kind}, ms", [by_side[name]["median"] for name in names])
        add("  tokens reused", [by_side[name]["cached_tokens"] for name in names])
    add("long prompt: first token, ms", [disturbed[name]["first_token_ms"] for name in names])
    add("  gap p95 before, ms", [disturbed[name]["calm_gap_ms"].get("p95") for name in names])
    add("  gap p95 while, ms", [disturbed[name]["disturbed_gap_ms"].get("p95") for name in names])
    return rows
