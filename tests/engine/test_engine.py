from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from random_models import tiny_config, tiny_model

from lfm_mlx.cache import Transcript
from lfm_mlx.engine import Engine, PackedMask, Request, Row
from lfm_mlx.engine.masks import batch_mask
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


def alone(model: Model, request: Request) -> list[int]:
    engine = Engine(model)
    row = engine.submit(request)
    run(engine)
    return row.generated


def requests(max_tokens: Sequence[int] = (30, 12, 45, 20)) -> list[Request]:
    return [
        Request(prompt=prompt, sampling=sampling, max_tokens=count)
        for prompt, sampling, count in zip(PROMPTS, SAMPLINGS, max_tokens, strict=True)
    ]


@pytest.mark.parametrize("max_rows", [1, 2, 4])
def test_a_row_writes_the_same_alone_and_among_others_that_join_and_leave(model: Model, max_rows: int) -> None:
    engine = Engine(model, max_rows=max_rows)
    rows: list[Row] = []
    for request in requests():
        rows.append(engine.submit(request))
        for _ in range(4):
            engine.step()
    run(engine)
    assert [row.generated for row in rows] == [alone(model, request) for request in requests()]
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


def test_a_cancelled_row_leaves_and_the_others_go_on(model: Model) -> None:
    engine = Engine(model, max_rows=4)
    rows = [engine.submit(request) for request in requests()]
    for _ in range(8):
        engine.step()
    rows[2].cancel()
    engine.step()
    assert rows[2].finish_reason == "cancelled"
    run(engine)
    for i in (0, 1, 3):
        assert rows[i].generated == alone(model, requests()[i])


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
