"""How long does the mask of a token take, and how long does a grammar take to start, at 128,000 tokens?"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from lfm_mlx.bench.host_time import Taken
from lfm_mlx.bench.report import Report
from lfm_mlx.constrain import Constraint, GrammarTokenizer, JsonSchema, Mask, Matcher, Regex, ToolCalls
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer, special

VOCAB_SIZE = 128_000
MIN_VOCAB_SIZE = 1000
NUM_TOOLS = (1, 67)
STARTS = 9
ANSWERS = 20
ANSWER_LEN = 100

SPECIAL_TOKENS = (
    special.PAD, special.BOS, special.END_OF_TEXT, special.TURN_START, special.TURN_END,
    special.TOOL_CALL_START, special.TOOL_CALL_END,
)  # fmt: skip
THINK_TOKENS = (special.THINK_START, special.THINK_END)

NOTES = (
    "Milliseconds of the thread's processor time; masks also by the clock, where a busy machine shows.",
    "check: writing and checking the grammar of new tools; compile: their first Matcher; restart: one more Matcher.",
    "Masks are for tokens drawn evenly from the mask before, in calls that are required and without reasoning.",
    "The regex ends in 20 to 400 characters of any text, which have to be counted; that is dear.",
)

_Made = TypeVar("_Made")

Case = Callable[[int], Callable[[], Constraint]]
"""For each number another constraint of the same kind, ready to be made: what it is made of exists before."""


def ask_mask_time(
    model: Path | None = None,
    *,
    vocab_size: int = VOCAB_SIZE,
    num_tools: Sequence[int] = NUM_TOOLS,
    starts: int = STARTS,
    answers: int = ANSWERS,
) -> Report:
    """Time masks and the start of grammars: tool calls in both forms, a JSON schema, and a regex.

    Args:
        model: folder of a checkpoint whose tokenizer is taken instead of a made-up vocabulary.
        vocab_size: tokens of the made-up vocabulary.
        num_tools: numbers of tools.
        starts: grammars that are started in each case.
        answers: answers of up to 100 tokens that are drawn in each case.

    Raises:
        OptionError: `vocab_size` is below 1,000, or the tokenizer lacks what a case needs.
    """
    began = time.perf_counter()
    vocabulary = GrammarTokenizer(_tokenizer(model, vocab_size))
    tokenizer_s = time.perf_counter() - began
    cases = {
        name: {phase: _summary(times) for phase, times in measure_case(case, vocabulary, starts, answers).items()}
        for name, case in _cases(num_tools).items()
    }
    return Report(
        question="constrain",
        parameters={
            "model": None if model is None else str(model),
            "vocab_size": vocabulary.vocab_size,
            "num_tools": list(num_tools),
            "starts": starts,
            "answers": answers,
        },
        results={"tokenizer_s": round(tokenizer_s, 3), "cases": cases},
        title=f"Masks and grammars in ms, {vocabulary.vocab_size:,} tokens",
        header=["", "check", "compile", "restart", "mask", "95 %", "99 %", "by the clock", "95 %", "99 %"],
        rows=[[name, *_row(case)] for name, case in cases.items()],
        notes=(*NOTES, f"The vocabulary itself took {tokenizer_s:.1f} s to read, once."),
    )


def measure_case(
    case: Case, vocabulary: GrammarTokenizer, starts: int, answers: int, answer_len: int = ANSWER_LEN
) -> dict[str, list[Taken]]:
    """The times of one case by phase: check, compile, restart and mask."""
    times: dict[str, list[Taken]] = {"check": [], "compile": [], "restart": [], "mask": []}
    for index in range(starts):
        constraint, taken = timed(case(index))
        times["check"].append(taken)
        for phase in ("compile", "restart"):
            _, taken = timed(partial(Matcher, constraint, vocabulary))
            times[phase].append(taken)
    for seed in range(answers):
        times["mask"] += islice(_mask_times(Matcher(constraint, vocabulary), seed), answer_len)
    return times


def timed(function: Callable[[], _Made]) -> tuple[_Made, Taken]:
    """What `function` returns, and the time it took."""
    thread, clock = time.thread_time(), time.perf_counter()
    result = function()
    return result, Taken(thread_s=time.thread_time() - thread, clock_s=time.perf_counter() - clock)


def _mask_times(matcher: Matcher, seed: int) -> Iterator[Taken]:
    rng = np.random.default_rng(seed)
    while not matcher.is_stopped:
        mask, taken = timed(matcher.mask)
        yield taken
        matcher.accept(int(rng.choice(allowed_ids(mask))))


def allowed_ids(mask: Mask) -> NDArray[np.int64]:
    """The ids that a packed mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def _summary(times: Sequence[Taken]) -> dict[str, Any]:
    return {
        "count": len(times),
        "thread_ms": _percentiles([taken.thread_s for taken in times]),
        "clock_ms": _percentiles([taken.clock_s for taken in times]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    named = {"best": 0, "median": 50, "p95": 95, "p99": 99}
    return {name: round(1000 * float(np.percentile(seconds, rank)), 4) for name, rank in named.items()}


def _row(case: dict[str, Any]) -> list[float]:
    starts = [case[phase]["thread_ms"]["median"] for phase in ("check", "compile", "restart")]
    return starts + [
        case["mask"][clock][name] for clock in ("thread_ms", "clock_ms") for name in ("median", "p95", "p99")
    ]


def _cases(num_tools: Sequence[int]) -> dict[str, Case]:
    cases: dict[str, Case] = {
        f"{count} {'tool' if count == 1 else 'tools'}, {form}": partial(_tool_calls, count, form)
        for count in num_tools
        for form in ("pythonic", "json")
    }
    return {**cases, "JSON schema": _json_schema, "regex": _regex}


def _tool_calls(count: int, form: Any, seed: int) -> Callable[[], Constraint]:
    tools = tools_like_a_server(count, seed)
    return partial(ToolCalls, tools, tool_choice="required", reasoning="forbidden", form=form)


def _json_schema(seed: int) -> Callable[[], Constraint]:
    properties = {tool["name"]: tool["parameters"] for tool in tools_like_a_server(8, seed)}
    return partial(JsonSchema, {"type": "object", "properties": properties}, reasoning="forbidden")


def _regex(seed: int) -> Callable[[], Constraint]:
    return partial(Regex, rf"[A-Z]{{2,5}}-{seed}\d{{3,6}} (open|closed): [^\n]{{20,400}}\.", reasoning="forbidden")


def tools_like_a_server(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` tools with names, numbers of parameters and types as MCP servers have them; another seed, other tools."""
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
    nouns = "path", "query", "limit", "owner", "repo", "title", "body", "page", "id", "state", "labels", "sort", "since"
    tools = []
    for index in range(count):
        names = [str(name) for name in rng.choice(nouns, size=rng.integers(1, 7), replace=False)]
        if index % 2:
            names[-1] = f"{names[-1]}_{seed}_{index}"
        properties = {name: kinds[rng.integers(len(kinds))] for name in names}
        parameters = {"type": "object", "properties": properties, "required": names[: rng.integers(0, 3)]}
        tools.append({"name": f"server_{index}.do_{names[0]}_{seed}", "parameters": parameters})
    return tools


def _tokenizer(model: Path | None, vocab_size: int) -> Tokenizer:
    if model is not None:
        return load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        return wide_tokenizer(Path(folder), vocab_size)


def wide_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer whose tokens are as many and as long as LFM2.5's: bytes, words, numbers, punctuation, white space.

    Raises:
        OptionError: `vocab_size` is below 1,000.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise OptionError(f"vocab_size is {vocab_size}, expected at least {MIN_VOCAB_SIZE:,}; give a larger one")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *THINK_TOKENS, *alphabet])}
    for token in _wide_tokens():
        if len(vocabulary) == vocab_size:
            break
        vocabulary.setdefault(token, len(vocabulary))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return load_tokenizer(save_tokenizer(backend, folder))


def save_tokenizer(backend: tokenizers.Tokenizer, folder: Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json; the think tokens are added, not special, as in LFM2.5."""
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special.BOS, "eos_token": special.TURN_END, "pad_token": special.PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _wide_tokens() -> Iterator[str]:
    space, newline, tab = "Ġ", "Ċ", "ĉ"
    for number in range(1000):
        yield str(number)
    for length in range(1, 65):
        yield from (space * length, tab * min(length, 16), newline * min(length, 16), newline + space * length)
    marks = "\"'`.,:;!?()[]{}<>=+-*/\\|&^%$#@~_"
    for first in marks:
        for second in ["", *marks]:
            for third in ["", '"', "'", ",", ")", "]", "}", ":", newline]:
                yield from (first + second + third, space + first + second + third)
    rng = random.Random(0)
    syllables = [
        a + b + c for a in ["", *"bcdfghklmnprstvw", "st", "tr", "ch"] for b in "aeiou" for c in ["", *"nrslt"]
    ]
    accents = ["Ã©", "Ã¼", "Ã¶", "Ð¿", "Ðµ", "æĹ", "¥æľ", "ä¸", "ãģ", "ðŁĻ"]
    while True:
        word = "".join(rng.choice(syllables) for _ in range(rng.choice([1, 1, 2, 2, 2, 3, 3, 4])))
        if rng.random() < 0.15:
            word += rng.choice(accents) * rng.randint(1, 2)
        yield from (word, space + word)
        if rng.random() < 0.3:
            yield from (word.capitalize(), space + word.capitalize(), "_" + word, "." + word)
