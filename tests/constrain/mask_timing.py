"""How long grammars take to start and masks to compute, at the width of LFM2.5's vocabulary."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import small_tokenizers
from drawing import allowed_ids

from lfm_mlx.constrain import Constraint, GrammarTokenizer, JsonSchema, Matcher, ToolCalls, grammar_tokenizer


@dataclass(frozen=True, kw_only=True)
class MaskTimes:
    """Milliseconds; `check_ms` and `start_ms` are the best of several, with nothing compiled before.

    Args:
        check_ms: making the constraint, which checks it.
        start_ms: making its matcher, which compiles the grammar.
        restart_ms: making its matcher again.
        median_ms, p99_ms, max_ms: one mask.
        num_masks: how many were measured.
    """

    check_ms: float
    start_ms: float
    restart_ms: float
    median_ms: float
    p99_ms: float
    max_ms: float
    num_masks: int


def measure_masks(
    make: Any,
    vocabulary: GrammarTokenizer,
    *,
    num_answers: int = 20,
    num_tokens: int = 100,
    num_starts: int = 5,
    clock: Any = time.perf_counter,
) -> MaskTimes:
    """Measure the constraint that `make(n)` makes; every n must give another grammar, or a start is a cached one."""
    checks, starts = [], []
    for index in range(num_starts):
        began = clock()
        constraint: Constraint = make(index)
        made = clock()
        Matcher(constraint, vocabulary)
        starts.append(clock() - made)
        checks.append(made - began)
    began = clock()
    Matcher(constraint, vocabulary)
    restart = clock() - began
    masks = []
    row = np.zeros(vocabulary.num_words, dtype=np.uint32)
    for seed in range(num_answers):
        rng = np.random.default_rng(seed)
        matcher = Matcher(constraint, vocabulary)
        for _ in range(num_tokens):
            began = clock()
            matcher.fill(row)
            masks.append(clock() - began)
            matcher.accept(int(rng.choice(allowed_ids(row))))
            if matcher.is_stopped:
                break
    times = 1000 * np.array(masks)
    return MaskTimes(
        check_ms=1000 * min(checks),
        start_ms=1000 * min(starts),
        restart_ms=1000 * restart,
        median_ms=float(np.median(times)),
        p99_ms=float(np.percentile(times, 99)),
        max_ms=float(times.max()),
        num_masks=len(times),
    )


def tools_like_a_server(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` tools with names, numbers of parameters and types as MCP servers have them."""
    rng = np.random.default_rng(seed)
    kinds: list[dict[str, Any]] = [
        {"type": "string", "description": "Some text"},
        {"type": "string", "enum": ["asc", "desc"]},
        {"type": "integer", "minimum": 1, "maximum": 100},
        {"type": "boolean", "default": False},
        {"type": "number"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
    ]
    nouns = [
        "path",
        "query",
        "limit",
        "owner",
        "repo",
        "title",
        "body",
        "page",
        "id",
        "state",
        "labels",
        "sort",
        "since",
    ]
    tools = []
    for index in range(count):
        names = [str(name) for name in rng.choice(nouns, size=rng.integers(1, 7), replace=False)]
        if index % 2:
            names[-1] = f"{names[-1]}_{seed}_{index}"
        properties = {name: kinds[rng.integers(len(kinds))] for name in names}
        parameters = {"type": "object", "properties": properties, "required": names[: rng.integers(0, 3)]}
        tools.append({"name": f"server_{index}.do_{names[0]}_{seed}", "parameters": parameters})
    return tools


def measure_all(vocabulary: GrammarTokenizer, **options: Any) -> dict[str, dict[str, float]]:
    """The measurements of README and bench: tools with calls required in both forms, and a JSON schema."""
    makers: dict[str, Any] = {
        f"{count} tools, {form}": lambda seed, count=count, form=form: ToolCalls(
            tools_like_a_server(count, seed), tool_choice="required", reasoning="forbidden", form=form
        )
        for count in (1, 67)
        for form in ("pythonic", "json")
    }
    makers["JSON schema"] = lambda seed: JsonSchema(
        tools_like_a_server(8, 100 + seed)[7]["parameters"], reasoning="forbidden"
    )
    return {name: asdict(measure_masks(make, vocabulary, **options)) for name, make in makers.items()}


def main() -> None:
    """Print the measurements at V = 128,000."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = small_tokenizers.wide_tokenizer(Path(folder))
        began = time.perf_counter()
        vocabulary = grammar_tokenizer(tokenizer)
        sys.stdout.write(f"V = {vocabulary.vocab_size}, tokenizer {time.perf_counter() - began:.2f} s\n")
        for name, times in measure_all(
            vocabulary, clock=time.thread_time if "--cpu" in sys.argv else time.perf_counter
        ).items():
            sys.stdout.write(f"{name}: {', '.join(f'{key} {value:.3f}' for key, value in times.items())}\n")


if __name__ == "__main__":
    main()
