"""An exception at every stage of the engine: only the rows it concerns end, and the others write what they would."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
from random_models import tiny_config, tiny_model

from lfm_mlx.cache import PrefixCache, State
from lfm_mlx.engine import Engine, EngineThread, Request, Row
from lfm_mlx.engine.batch import Batch
from lfm_mlx.engine.engine import MAX_FAILURES
from lfm_mlx.model import Model, Passage
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import Stepper
from lfm_mlx.types import FinishReason, SamplingParams

POISON = 96
"""The first token of the prompt of the request that fails."""


class InjectedError(Exception):
    """What the tests let go wrong."""


@pytest.fixture(scope="module")
def model() -> Model:
    built = tiny_model(tiny_config())
    mx.eval(built.parameters())
    return built


def requests() -> list[Request]:
    return [
        Request(prompt=[3 + i] * (2 + 5 * i), sampling=SamplingParams(temperature=4.0, seed=i), max_tokens=14)
        for i in range(3)
    ]


def poisoned(control: Any = None) -> Request:
    return Request(prompt=[POISON, 5, 6], sampling=SamplingParams(), max_tokens=12, control=control)


def run(engine: Engine) -> None:
    for _ in range(2000):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError("the engine does not become idle")


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    written = []
    for request in requests():
        engine = Engine(model)
        row = engine.submit(request)
        run(engine)
        written.append(row.generated)
    return written


class FailingControl:
    """Fails at the third token, in one of its methods."""

    has_mask = True

    def __init__(self, where: str) -> None:
        self.where = where
        self.num_seen = 0

    def _fail(self, where: str) -> None:
        if where == self.where and self.num_seen >= 2:
            raise InjectedError(where)

    def mask(self) -> None:
        self._fail("mask")

    def forced(self) -> Sequence[int]:
        self._fail("forced")
        return ()

    def observe(self, token_id: int) -> FinishReason | None:
        self._fail("observe")
        self.num_seen += 1
        return None


def assert_only_the_poisoned_row_fails(model: Model, expected: list[list[int]], request: Request) -> Row:
    engine = Engine(model, max_rows=4)
    rows = [engine.submit(one) for one in requests()[:2]]
    bad = engine.submit(request)
    rows.append(engine.submit(requests()[2]))
    run(engine)
    assert [row.generated for row in rows] == expected
    assert (bad.finish_reason, type(bad.error)) == ("error", InjectedError)
    assert engine.held_bytes == 0
    late = engine.submit(requests()[1])
    run(engine)
    assert late.generated == expected[1]
    return bad


@pytest.mark.parametrize("where", ["mask", "forced", "observe"])
def test_a_control_that_fails_ends_its_row(model: Model, expected: list[list[int]], where: str) -> None:
    bad = assert_only_the_poisoned_row_fails(model, expected, poisoned(FailingControl(where)))
    assert len(bad.generated) == 3 if where == "observe" else 2


def has_poison(state: State, tokens: mx.array) -> bool:
    """Whether a chunk holds the token that only the failing request has."""
    return POISON in tokens.reshape(-1).tolist()  # type: ignore[operator]


def test_a_prompt_that_fails_ends_its_row(
    monkeypatch: pytest.MonkeyPatch, model: Model, expected: list[list[int]]
) -> None:
    passage = Stepper.passage

    def failing(stepper: Stepper, state: State, tokens: mx.array, counts: Any = None) -> Passage:
        if has_poison(state, tokens):
            raise InjectedError("prefill")
        return passage(stepper, state, tokens, counts)

    monkeypatch.setattr(Stepper, "passage", failing)
    assert assert_only_the_poisoned_row_fails(model, expected, poisoned()).generated == []


@pytest.mark.parametrize("layer", [1, 3])
def test_a_prompt_that_fails_between_its_layers_ends_its_row(
    monkeypatch: pytest.MonkeyPatch, model: Model, expected: list[list[int]], layer: int
) -> None:
    run_layers = Passage.run
    poisoned_ones: list[Passage] = []

    def failing(passage: Passage, num_layers: int) -> None:
        if passage.num_run == layer and passage in poisoned_ones:
            raise InjectedError("a layer")
        run_layers(passage, num_layers)

    begin = Stepper.passage

    def watched(stepper: Stepper, state: State, tokens: mx.array, counts: Any = None) -> Passage:
        made = begin(stepper, state, tokens, counts)
        if has_poison(state, tokens):
            poisoned_ones.append(made)
        return made

    monkeypatch.setattr(Passage, "run", failing)
    monkeypatch.setattr(Stepper, "passage", watched)
    assert assert_only_the_poisoned_row_fails(model, expected, poisoned()).generated == []


STEPS: dict[str, tuple[type, str]] = {
    "decode": (Stepper, "decode_and_sample"),
    "sampler": (Sampler, "start"),
    "hand out": (Batch, "_hand_out"),
    "join": (Batch, "join"),
}


def rows_of(place: str, args: Sequence[Any]) -> list[list[int]]:
    """The prompts of the rows that a call is about."""
    if place == "decode":
        return [[length] for length in args[1].lengths]
    if place == "sampler":
        return [list(prompt) for prompt in args[1]]
    return [list(row.request.prompt) for row in args[0].rows]


@pytest.mark.parametrize("place", ["sampler", "hand out"])
def test_a_step_that_fails_because_of_one_row_ends_that_row(
    monkeypatch: pytest.MonkeyPatch, model: Model, expected: list[list[int]], place: str
) -> None:
    owner, name = STEPS[place]
    whole = getattr(owner, name)

    def failing(*args: Any, **options: Any) -> Any:
        if any(prompt[0] == POISON for prompt in rows_of(place, args)):
            raise InjectedError(place)
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, failing)
    assert_only_the_poisoned_row_fails(model, expected, poisoned())


@pytest.mark.parametrize("place", ["decode", "hand out", "join"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_step_that_fails_once_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, model: Model, expected: list[list[int]], place: str, at: int
) -> None:
    owner, name = STEPS[place]
    whole = getattr(owner, name)
    calls = itertools.count()

    def failing(*args: Any, **options: Any) -> Any:
        is_shared = place == "join" or len(args[1].lengths if place == "decode" else args[0].rows) > 1
        if is_shared and next(calls) == at:
            raise InjectedError(place)
        return whole(*args, **options)

    monkeypatch.setattr(owner, name, failing)
    engine = Engine(model, max_rows=3)
    rows = [engine.submit(request) for request in requests()]
    run(engine)
    assert [row.generated for row in rows] == expected
    assert (engine.num_restarted > 0) == (next(calls) > at)


def test_steps_that_always_fail_end_their_rows(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    def failing(*args: Any, **options: Any) -> Any:
        raise InjectedError("decode")

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "decode_and_sample", failing)
        engine = Engine(model, max_rows=3)
        rows = [engine.submit(request) for request in requests()]
        run(engine)
        assert {row.finish_reason for row in rows} == {"error"}
        assert engine.num_restarted <= 3 * MAX_FAILURES
    assert engine.held_bytes == 0
    again = engine.submit(requests()[0])
    run(engine)
    assert again.finish_reason == "length"


@pytest.mark.parametrize("method", ["restore", "insert"])
def test_a_prefix_cache_that_fails_costs_at_most_the_row_that_asked(
    monkeypatch: pytest.MonkeyPatch, model: Model, expected: list[list[int]], method: str
) -> None:
    cache = PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 24, block_tokens=8)
    engine = Engine(model, max_rows=3, prefix_cache=cache)
    first = engine.submit(requests()[2])
    run(engine)

    def failing(*args: Any) -> Any:
        raise InjectedError(method)

    with monkeypatch.context() as patch:
        patch.setattr(PrefixCache, method, failing)
        hurt = engine.submit(requests()[2])
        run(engine)
    after = [engine.submit(request) for request in requests()]
    run(engine)
    assert first.generated == expected[2]
    assert hurt.finish_reason == ("error" if method == "restore" else "length")
    assert [row.generated for row in after] == expected


def test_a_callback_that_fails_ends_its_row_and_the_thread_goes_on(model: Model, expected: list[list[int]]) -> None:
    engine = EngineThread(model, max_rows=3)
    ended = threading.Semaphore(0)

    def fail() -> None:
        raise InjectedError("callback")

    hurt = engine.submit(Request(prompt=[9], sampling=SamplingParams(), max_tokens=1500), fail)
    rows: list[Row] = []
    is_ready = threading.Event()

    def callback(i: int) -> Callable[[], None]:
        def note() -> None:
            is_ready.wait(60)
            if rows[i].finish_reason is not None:
                ended.release()

        return note

    rows += [engine.submit(request, callback(i)) for i, request in enumerate(requests())]
    is_ready.set()
    for _ in rows:
        assert ended.acquire(timeout=120)
    engine.close(timeout_s=120)
    assert [row.generated for row in rows] == expected
    assert (hurt.finish_reason, type(hurt.error)) == ("error", InjectedError)
    assert engine.counters.num_failed == 1


def test_an_engine_that_fails_as_a_whole_is_started_again(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    engine = EngineThread(model)
    is_ended = threading.Event()

    def failing(*args: Any) -> Any:
        raise InjectedError("scheduler")

    with monkeypatch.context() as patch:
        patch.setattr("lfm_mlx.engine.scheduler.Scheduler.assign", failing)
        hurt = engine.submit(requests()[0], is_ended.set)
        assert is_ended.wait(60)
    assert (hurt.finish_reason, type(hurt.error)) == ("error", InjectedError)
    row = engine.submit(requests()[0])
    engine.close(timeout_s=120)
    assert row.finish_reason == "length"
