"""Requests of many threads in one engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from random_models import tiny_config, tiny_model

from lfm_mlx.cache import DiskStore, PrefixCache
from lfm_mlx.engine import Engine, EngineThread, Request, Row
from lfm_mlx.errors import ContextLengthError, EngineClosedError, OptionError, QueueFullError
from lfm_mlx.model import Model
from lfm_mlx.types import SamplingParams

PATIENCE_S = 120


@pytest.fixture(scope="module")
def model() -> Model:
    built = tiny_model(tiny_config())
    mx.eval(built.parameters())
    return built


@pytest.fixture
def engine(model: Model) -> Iterator[EngineThread]:
    running = EngineThread(model, max_rows=3, max_waiting=4)
    yield running
    running.close()


def request(number: int, **changes: object) -> Request:
    options: dict[str, object] = {
        "prompt": [5 + number] * (1 + number * 7 % 11),
        "sampling": SamplingParams(temperature=4.0, seed=number),
        "max_tokens": 6 + number % 5,
    }
    return Request(**{**options, **changes})  # type: ignore[arg-type]


class Finished:
    """Calls back for one row, and waits for its end."""

    def __init__(self, engine: EngineThread, request: Request) -> None:
        self.num_calls = 0
        self._ended = threading.Event()
        self._submitted = threading.Event()
        self.row: Row | None = None
        self.row = engine.submit(request, self._note)
        self._submitted.set()

    def _note(self) -> None:
        self._submitted.wait(PATIENCE_S)
        self.num_calls += 1
        if self.row is not None and self.row.finish_reason is not None:
            self._ended.set()

    def wait(self) -> Row:
        assert self._ended.wait(PATIENCE_S), "the row does not end"
        assert self.row is not None
        return self.row


def alone(model: Model, request: Request) -> list[int]:
    engine = Engine(model)
    row = engine.submit(request)
    while not engine.is_idle:
        engine.step()
    return row.generated


def test_rows_of_many_threads_write_what_each_writes_alone(model: Model) -> None:
    engine = EngineThread(model, max_rows=3)
    written: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        finished = Finished(engine, request(number))
        written[number] = finished.wait().generated
        assert finished.num_calls >= 2

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert written == {number: alone(model, request(number)) for number in range(8)}
    assert written[0] != alone(model, request(0, sampling=SamplingParams(temperature=4.0, seed=99)))
    engine.close()
    counters = engine.counters
    assert (counters.num_requests, counters.num_finished, counters.num_running) == (8, 8, 0)
    assert counters.generated_tokens == sum(map(len, written.values()))


def test_more_requests_than_may_wait_are_refused_and_others_end(engine: EngineThread) -> None:
    blocked, is_released = threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        is_released.wait(PATIENCE_S)

    engine.submit(request(1), block)
    assert blocked.wait(PATIENCE_S)
    rows = [Finished(engine, request(number)) for number in range(2, 8)]
    with pytest.raises(QueueFullError, match="4 requests wait") as refusal:
        engine.submit(request(9))
    assert refusal.value.retry_after_s >= 1
    assert engine.counters.num_refused == 1
    is_released.set()
    assert {row.wait().finish_reason for row in rows} == {"length"}
    assert Finished(engine, request(9)).wait().finish_reason == "length"


def test_requests_that_do_not_fit_are_refused_at_once(engine: EngineThread) -> None:
    with pytest.raises(OptionError, match="token id 97"):
        engine.submit(request(1, prompt=[97]))
    with pytest.raises(ContextLengthError, match="2,048"):
        engine.submit(request(1, prompt=[5] * 2048))
    with pytest.raises(OptionError, match="logit_bias"):
        engine.submit(request(1, sampling=SamplingParams(logit_bias={200: 1.0})))
    assert Finished(engine, request(1)).wait().finish_reason == "length"


def test_closing_lets_rows_finish_for_a_while_and_then_cancels_them(model: Model) -> None:
    engine = EngineThread(model)
    row = Finished(engine, request(1, max_tokens=5))
    engine.close(timeout_s=PATIENCE_S)
    assert row.wait().finish_reason == "length"
    with pytest.raises(EngineClosedError):
        engine.submit(request(1))
    engine = EngineThread(model)
    row = Finished(engine, request(1, max_tokens=2000))
    engine.close()
    assert row.wait().finish_reason == "cancelled"
    assert not engine.is_alive


def test_an_engine_that_starts_after_another_goes_on_from_what_that_one_wrote_to_disk(
    model: Model, tmp_path: Path
) -> None:
    prompt = [7 + i % 80 for i in range(60)]
    cached, generated = [], []
    for _ in range(2):
        store = DiskStore(tmp_path, max_bytes=1 << 30, fingerprint="one")
        cache = PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 30, block_tokens=16, disk=store)
        engine = EngineThread(model, prefix_cache=cache)
        row = engine.submit(Request(prompt=prompt, sampling=SamplingParams(temperature=0), max_tokens=6))
        engine.close(60)
        assert row.finish_reason == "length"
        cached.append(row.cached_tokens)
        generated.append(row.generated)
    assert cached == [0, 59]
    assert generated[0] == generated[1]


def test_freed_buffers_go_back_to_the_system_when_there_is_nothing_to_do(engine: EngineThread) -> None:
    kept: list[int] = []
    for number in range(2):
        engine.submit(request(number, max_tokens=3), lambda: kept.append(mx.get_cache_memory()))
        deadline = time.monotonic() + PATIENCE_S
        while not kept or mx.get_cache_memory():
            assert time.monotonic() < deadline, "they stay"
            time.sleep(0.05)
        assert max(kept) > 0
        kept.clear()


def test_rows_go_on_while_another_one_s_prefix_is_read_from_disk(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [7 + i % 80 for i in range(60)]
    may_read = threading.Event()

    def started() -> EngineThread:
        store = DiskStore(tmp_path, max_bytes=1 << 30, fingerprint="one")
        cache = PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 30, block_tokens=16, disk=store)
        return EngineThread(model, prefix_cache=cache)

    def read_late(self: DiskStore, key: str) -> object:
        assert may_read.wait(PATIENCE_S)
        return read(self, key)

    engine = started()
    expected = Finished(engine, request(0, prompt=prompt)).wait().generated
    engine.close()
    read = DiskStore._read
    monkeypatch.setattr(DiskStore, "_read", read_late)
    engine = started()
    restored, cancelled = Finished(engine, request(0, prompt=prompt)), Finished(engine, request(0, prompt=prompt))
    cancelled.row.cancel()  # type: ignore[union-attr]
    assert len(Finished(engine, request(3)).wait().generated) > 0
    assert restored.row is not None
    assert (restored.row.generated, engine.counters.num_waiting) == ([], 2)
    may_read.set()
    assert restored.wait().generated == expected
    assert restored.row.cached_tokens == 59
    assert cancelled.wait().finish_reason == "cancelled"
    engine.close()
