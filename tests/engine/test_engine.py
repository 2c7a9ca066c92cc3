from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from random_models import tiny_config, tiny_model

from lfm_mlx import memory
from lfm_mlx.cache import PrefixCache, Transcript
from lfm_mlx.engine import Engine, PackedMask, Request, Row, scheduler
from lfm_mlx.engine.masks import batch_mask
from lfm_mlx.errors import MemoryPlanError, OptionError
from lfm_mlx.model import Model
from lfm_mlx.types import FinishReason, SamplingParams

VOCAB_SIZE = 97
PROMPTS = ([5, 6, 7], [9] * 40, [11, 3, 8, 2, 50, 61, 7], [1])
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=1.3, seed=4, top_k=20),
    SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.3, min_p=0.02),
    SamplingParams(temperature=1.0, seed=6, top_p=0.8, presence_penalty=0.4, penalty_window=9),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(tiny_config(vocab_size=VOCAB_SIZE))


def run(engine: Engine, limit: int = 10_000) -> None:
    for _ in range(limit):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError("the engine does not become idle")


def alone(model: Model, request: Request, kv_bits: int | None = None) -> list[int]:
    engine = Engine(model, kv_bits=kv_bits)
    row = engine.submit(request)
    run(engine)
    return row.generated


def requests(max_tokens: Sequence[int] = (30, 12, 45, 20)) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=sampling, max_tokens=count)
        for prompt, sampling, count in zip(PROMPTS, SAMPLINGS, max_tokens, strict=True)
    ]


@pytest.fixture(scope="module")
def written(model: Model) -> list[list[int]]:
    """What each of `requests()` writes alone."""
    return [alone(model, request) for request in requests()]


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_a_row_writes_the_same_alone_and_among_others_that_join_and_leave(
    model: Model, written: list[list[int]], max_rows: int
) -> None:
    engine = Engine(model, max_rows=max_rows)
    rows: list[Row] = []
    for request in requests():
        rows.append(engine.submit(request))
        for _ in range(4):
            engine.step()
    run(engine)
    assert [row.generated for row in rows] == written
    assert [row.finish_reason for row in rows] == ["length"] * 4
    other_seed = Request(prompt=PROMPTS[1], sampling=SamplingParams(temperature=1.3, seed=7, top_k=20), max_tokens=12)
    assert alone(model, other_seed) != rows[1].generated


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_quantised_keys_and_values_change_nothing_of_that(kv_bits: int) -> None:
    model = tiny_model(tiny_config(vocab_size=VOCAB_SIZE, head_dim=32))
    model.kv_bits = kv_bits
    engine = Engine(model, max_rows=4)
    rows = [engine.submit(request) for request in requests()]
    run(engine)
    assert [row.generated for row in rows] == [alone(model, request) for request in requests()]


def test_a_stop_token_ends_a_row_and_belongs_to_it(model: Model) -> None:
    (first, *_) = requests()
    written = alone(model, first)
    stop_id = next(token for token in written[3:] if token not in written[:3])
    row_end = written.index(stop_id) + 1
    request = Request(prompt=first.prompt, sampling=first.sampling, max_tokens=30, stop_ids=frozenset({stop_id}))
    assert alone(model, request) == written[:row_end]


def test_a_cancelled_row_leaves_and_the_others_go_on(model: Model, written: list[list[int]]) -> None:
    engine = Engine(model, max_rows=4)
    rows = [engine.submit(request) for request in requests()]
    for _ in range(8):
        engine.step()
    rows[2].cancel()
    engine.step()
    assert rows[2].finish_reason == "cancelled"
    run(engine)
    for i in (0, 1, 3):
        assert rows[i].generated == written[i]


def test_a_request_cancelled_while_it_waits_computes_nothing(model: Model) -> None:
    engine = Engine(model, max_rows=1)
    first, second = (engine.submit(request) for request in requests()[:2])
    engine.step()
    second.cancel()
    run(engine)
    assert (second.finish_reason, second.generated) == ("cancelled", [])
    assert first.finish_reason == "length"


class Script:
    """Allows even tokens only, forces given ones at given places, and ends the row after `length` tokens."""

    def __init__(self, forced: dict[int, int], length: int) -> None:
        self.forced_at = forced
        self.length = length
        self.seen: list[int] = []

    def mask(self) -> PackedMask | None:
        bits = np.zeros(128, dtype=np.uint8)
        bits[:VOCAB_SIZE:2] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    @property
    def has_mask(self) -> bool:
        return True

    def forced(self) -> list[int]:
        run = []
        while (token_id := self.forced_at.get(len(self.seen) + len(run))) is not None:
            run.append(token_id)
        return run

    def observe(self, token_id: int) -> FinishReason | None:
        self.seen.append(token_id)
        return "stop" if len(self.seen) == self.length else None


def test_a_control_masks_forces_and_ends_its_own_row_only(model: Model) -> None:
    engine = Engine(model, max_rows=4)
    control = Script({0: 33, 5: 77, 6: 1}, 15)
    plain, sampled, *_ = requests()
    ruled = Request(prompt=sampled.prompt, sampling=sampled.sampling, max_tokens=40, control=control)
    free_row, ruled_row = engine.submit(plain), engine.submit(ruled)
    run(engine)
    assert free_row.generated == alone(model, plain)
    assert any(token % 2 for token in free_row.generated)
    assert ruled_row.generated == control.seen
    assert (ruled_row.finish_reason, len(control.seen)) == ("stop", 15)
    assert [control.seen[i] for i in (0, 5, 6)] == [33, 77, 1]
    assert all(token % 2 == 0 for i, token in enumerate(control.seen) if i not in (0, 5, 6))


def test_a_forced_token_counts_for_the_penalties_and_the_drawn_one_does_not(model: Model) -> None:
    sampling = SamplingParams(repetition_penalty=1.0, logit_bias={20: 1000.0, 30: 900.0}, presence_penalty=300.0)
    control = Script({0: 30}, 2)
    row_ids = alone(model, Request(prompt=[5], sampling=sampling, max_tokens=9, control=control))
    assert row_ids == [30, 20]  # 30 is penalised now; 20, which would have been drawn first, is not.
    uncontrolled = alone(model, Request(prompt=[5], sampling=sampling, max_tokens=2))
    assert uncontrolled == [20, 30]


@pytest.mark.parametrize(("kv_bits", "seed"), [(None, 0), (None, 1), (8, 2)])
def test_no_row_depends_on_its_neighbours_whatever_they_are(kv_bits: int | None, seed: int) -> None:
    model = wide_model()
    order = np.random.default_rng(seed)
    mixed = [drawn_request(number) for number in range(12)]
    engine = Engine(model, max_rows=5, kv_bits=kv_bits)
    rows: list[Row] = []
    cancelled = set(order.choice(12, 2, replace=False).tolist())
    for number in order.permutation(12):
        rows.append(engine.submit(mixed[number]))
        for _ in range(int(order.integers(0, 9))):
            engine.step()
        if number in cancelled:
            rows[-1].cancel()
    run(engine)
    for row in rows:
        if row.finish_reason != "cancelled":
            number = mixed.index(row.request)
            assert row.generated == drawn_alone(number, kv_bits), number
    assert sum(row.finish_reason == "cancelled" for row in rows) <= 2
    assert engine.held_bytes == 0


@functools.cache
def wide_model() -> Model:
    return tiny_model(tiny_config(vocab_size=VOCAB_SIZE, head_dim=32))


def drawn_request(number: int) -> Request:
    """One of twelve unequal requests: every sampling, with and without controls and log-probabilities."""
    order = np.random.default_rng(100 + number)
    sampling = dataclasses.replace(SAMPLINGS[number % 4], seed=number)
    control = Script({1: 33, 4: 77, 5: 1, 6: 3}, 14) if number % 3 == 0 else None
    return Request(
        prompt=order.integers(0, VOCAB_SIZE, int(order.integers(1, 90))).tolist(),
        sampling=sampling,
        max_tokens=int(order.integers(1, 25)),
        control=control,
        top_logprobs=3 if number % 4 == 1 else None,
    )


@functools.cache
def drawn_alone(number: int, kv_bits: int | None) -> list[int]:
    return alone(wide_model(), drawn_request(number), kv_bits)


def test_rows_that_lose_their_place_write_the_same(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setattr(scheduler, "HEADROOM_TOKENS", 0)
    longer = [dataclasses.replace(request, prompt=[*PROMPTS[2]] * 34) for request in requests((40, 25, 30, 35))]
    limit = 2 * Engine(model).bytes_of(300)
    engine = Engine(model, max_rows=4, memory_bytes=limit)
    rows = [engine.submit(request) for request in longer]
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, engine.held_bytes)
    assert engine.num_sent_back > 0
    assert limit // 2 < most <= limit
    assert [row.generated for row in rows] == [alone(model, request) for request in longer]
    with pytest.raises(MemoryPlanError, match="GB"):
        engine.submit(dataclasses.replace(longer[0], max_tokens=2000))


def test_room_is_given_back_when_a_long_row_leaves(model: Model) -> None:
    engine = Engine(model, max_rows=2)
    long = engine.submit(Request(prompt=[5] * 600, sampling=SamplingParams(), max_tokens=30))
    short = engine.submit(Request(prompt=[6] * 10, sampling=SamplingParams(), max_tokens=100))
    held = []
    while not engine.is_idle:
        engine.step()
        held.append(engine.held_bytes)
    assert (long.finish_reason, short.finish_reason) == ("length", "length")
    assert max(held) >= 2 * engine.bytes_of(600)
    assert held[-2] == engine.bytes_of(110)


def test_a_row_cancelled_in_its_prompt_leaves_within_a_step(model: Model) -> None:
    engine = Engine(model, max_rows=2)
    short = engine.submit(Request(prompt=[6] * 10, sampling=SamplingParams(), max_tokens=200))
    engine.step()
    long = engine.submit(Request(prompt=[5] * 1900, sampling=SamplingParams(), max_tokens=5))
    engine.step()
    assert engine.num_running == 2
    before = engine.held_bytes
    long.cancel()
    engine.step()
    assert (long.finish_reason, long.generated, engine.num_running) == ("cancelled", [], 1)
    assert engine.held_bytes < before
    short.cancel()
    engine.step()
    assert (short.finish_reason, engine.held_bytes, engine.is_idle) == ("cancelled", 0, True)


@pytest.mark.parametrize("place", ["waiting", "prompt", "answer"])
def test_a_row_ends_when_its_time_is_over(model: Model, place: str) -> None:
    engine = Engine(model, max_rows=2 if place == "prompt" else 1)
    other = Request(prompt=[5], sampling=SamplingParams(), max_tokens=12)
    if place != "answer":
        engine.submit(other)
    engine.step()
    row = engine.submit(dataclasses.replace(other, prompt=[5] * 300, max_tokens=500, time_limit_s=3600.0))
    for _ in range(4):
        engine.step()
    assert engine.num_running == (2 if place == "prompt" else 1)
    row.started_s -= 3600.0
    engine.step()
    assert row.finish_reason == "time_limit"
    assert bool(row.generated) == (place == "answer")
    run(engine)


def reference_logprobs(model: Model, row: Row) -> Any:
    """What the whole text gives at once, (T, V)."""
    ids = [*row.request.prompt, *row.generated]
    logits = np.array(model(mx.array([ids[:-1]])))[0, len(row.request.prompt) - 1 :].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("control", [None, {0: 33, 3: 77, 4: 1}])
def test_log_probabilities_are_the_models_own_for_the_rows_that_ask(
    model: Model, control: dict[int, int] | None
) -> None:
    engine = Engine(model, max_rows=4)
    rows = [
        engine.submit(
            dataclasses.replace(
                request,
                top_logprobs=top,
                control=Script(control, 99) if control is not None and top == 5 else None,
            )
        )
        for request, top in zip(requests(), (5, None, 0, 2), strict=True)
    ]
    run(engine)
    for row, top in zip(rows, (5, None, 0, 2), strict=True):
        if top is None:
            assert row.logprobs == []
            continue
        expected = reference_logprobs(model, row)
        assert [one.token_id for one in row.logprobs] == row.generated
        found = np.array([one.logprob for one in row.logprobs])
        own = expected[np.arange(len(found)), row.generated]
        assert np.abs(found - own).max() < 1e-4
        assert np.abs(found - expected[np.arange(len(found)), [0] * len(found)]).max() > 1e-2
        for one, line in zip(row.logprobs, expected, strict=True):
            assert len(one.top) == top
            values = [value for _, value in one.top]
            assert np.abs(np.array(values) - np.sort(line)[::-1][:top]).max(initial=0.0) < 1e-4


def test_rows_go_on_from_what_earlier_rows_computed(model: Model) -> None:
    cache = PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 24, block_tokens=16)
    engine = Engine(model, max_rows=3, prefix_cache=cache)
    sampling = SamplingParams(temperature=3.0, seed=8)
    first = Request(prompt=list(range(5, 80)), sampling=sampling, max_tokens=40)
    cold = engine.submit(first)
    run(engine)
    again, other = engine.submit(first), engine.submit(dataclasses.replace(first, prompt=[*first.prompt[:50], 1, 2]))
    run(engine)
    turn = dataclasses.replace(first, prompt=[*first.prompt, *cold.generated, 9, 10, 11])
    next_turn = engine.submit(turn)
    run(engine)
    assert (cold.cached_tokens, again.cached_tokens, other.cached_tokens) == (0, 74, 48)
    assert again.generated == cold.generated == alone(model, first)
    assert other.generated == alone(model, other.request)
    assert next_turn.cached_tokens == 75 + 40
    assert next_turn.generated == alone(model, turn)


@pytest.mark.parametrize("prompt", [[], [5, VOCAB_SIZE], [-1]], ids=str)
def test_a_prompt_that_the_model_cannot_take_is_refused_before_anything_is_computed(
    model: Model, prompt: list[int]
) -> None:
    engine = Engine(model)
    with pytest.raises(OptionError, match="prompt"):
        engine.submit(Request(prompt=prompt, sampling=SamplingParams(), max_tokens=1))
    assert engine.is_idle


def test_a_batch_mask_is_one_where_a_row_has_none() -> None:
    mask = np.array([0b101, 1 << 31, 0, 0], dtype=np.uint32)
    unpacked = batch_mask([None, mask], VOCAB_SIZE)
    assert unpacked is not None
    assert unpacked.shape == (2, VOCAB_SIZE)
    assert unpacked[0].all()
    assert [i for i, bit in enumerate(unpacked[1].tolist()) if bit] == [0, 2, 63]
    assert batch_mask([None, None], VOCAB_SIZE) is None


def continue_transcript(model: Model, transcript: Transcript, prompt: list[int]) -> tuple[Row, mx.array]:
    engine = Engine(model)
    row = engine.submit(
        Request(
            prompt=prompt,
            sampling=SamplingParams(),
            max_tokens=8,
            transcript=transcript,
            border_ids=frozenset({1}),
        )
    )
    run(engine)
    here = transcript.state.mark()
    logits = model(mx.array([[0]]), transcript.state)
    transcript.state.rewind(here)
    return row, logits


def test_a_transcript_continues_like_a_cold_run_and_computes_only_what_is_new(model: Model) -> None:
    transcript = Transcript(model.new_state())
    conversation = [1, 5, 6, 7, 1, 8, 9]
    computed = []
    for turn in range(6):
        row, logits = continue_transcript(model, transcript, conversation)
        cold_row, cold_logits = continue_transcript(model, Transcript(model.new_state()), conversation)
        assert row.generated == cold_row.generated
        assert np.array_equal(np.array(logits), np.array(cold_logits))
        computed.append(len(conversation) - row.cached_tokens)
        assert cold_row.cached_tokens == 0
        conversation = [*conversation, *row.generated[:-1], 1, 10 + turn, 11]
    # The last token of an answer was never consumed: 3 new tokens a turn, and nothing twice.
    assert computed == [7, 3, 3, 3, 3, 3]


def test_an_edited_message_reuses_everything_up_to_the_message(model: Model) -> None:
    transcript = Transcript(model.new_state())
    prompt = [1, 5, 6, 7, 1, 8, 9, 1, 12, 13]
    continue_transcript(model, transcript, prompt)
    edited = [1, 5, 6, 7, 1, 8, 40, 1, 12, 13]
    row, logits = continue_transcript(model, transcript, edited)
    assert row.cached_tokens == 4
    cold_row, cold_logits = continue_transcript(model, Transcript(model.new_state()), edited)
    assert row.generated == cold_row.generated
    assert np.array_equal(np.array(logits), np.array(cold_logits))
    stale_row, _ = continue_transcript(model, Transcript(model.new_state()), prompt)
    assert not np.array_equal(np.array(logits), np.array(model(mx.array([prompt]))[:, -1:]))
    assert stale_row.cached_tokens == 0


def test_a_long_row_and_short_ones_are_decoded_apart_and_write_the_same(
    monkeypatch: pytest.MonkeyPatch, model: Model
) -> None:
    monkeypatch.setattr(memory, "CPU_STEP_BYTES", 100_000 - model.shared_bytes)
    mixed = requests((90, 50, 60, 50))
    mixed[0] = dataclasses.replace(mixed[0], prompt=[*PROMPTS[0]] * 250)
    engine = Engine(model, max_rows=4)
    rows = [engine.submit(request) for request in mixed]
    most = 0
    while not engine.is_idle:
        engine.step()
        most = max(most, engine.held_bytes)
    expected = [alone(model, request) for request in mixed]
    assert [row.generated for row in rows] == expected
    long = max(len(request.prompt) for request in mixed)
    together = Engine(model, max_rows=4)
    monkeypatch.setattr(together._scheduler, "padding_bytes", None)
    rows = [together.submit(request) for request in mixed]
    padded = 0
    while not together.is_idle:
        together.step()
        padded = max(padded, together.held_bytes)
    assert [row.generated for row in rows] == expected
    assert padded >= 3 * engine.bytes_of(long)
    assert most < 0.8 * padded
