from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.cache import State, Transcript, transcript
from lfm_mlx.model import Model

FIRST, SECOND = list(range(10, 20)), list(range(20, 26))


def read(model: Model, told: Transcript, ids: list[int]) -> None:
    model(mx.array([ids]), told.state)
    told.record(ids)


def next_logits(model: Model, told: Transcript) -> np.ndarray:
    here = told.state.mark()
    logits = np.array(model(mx.array([[3]]), told.state))
    told.state.rewind(here)
    return logits


def cold(model: Model, ids: list[int]) -> np.ndarray:
    return np.array(model(mx.array([[*ids, 3]])))[:, -1:]


@pytest.fixture
def marked(moe_model: Model) -> Transcript:
    """Two messages, with marks behind both."""
    told = Transcript(moe_model.new_state())
    for ids in (FIRST, SECOND):
        read(moe_model, told, ids)
        told.mark()
    return told


@pytest.mark.parametrize(
    ("prompt", "num_reused"),
    [
        ([*FIRST, *SECOND, 5], 16),
        ([*FIRST, *SECOND], 10),  # The last token has to be computed.
        ([*FIRST, 5, 6], 10),
        ([*FIRST, *SECOND[:3], 5], 10),
        ([*FIRST[:4], 5], 0),
        ([5], 0),
    ],
)
def test_a_prompt_goes_on_from_the_furthest_mark_that_it_shares(
    moe_model: Model, marked: Transcript, prompt: list[int], num_reused: int
) -> None:
    assert marked.reuse(prompt) == num_reused
    assert marked.ids == prompt[:num_reused]
    read(moe_model, marked, prompt[num_reused:])
    assert np.allclose(next_logits(moe_model, marked), cold(moe_model, prompt), atol=1e-5)
    assert not np.allclose(next_logits(moe_model, marked), cold(moe_model, [*prompt[:-1], 7]), atol=1e-5)


def test_a_state_that_ran_ahead_of_its_tokens_goes_back(moe_model: Model, marked: Transcript) -> None:
    moe_model(mx.array([[30, 31]]), marked.state)  # An answer that was given up: nobody noted its tokens.
    prompt = [*FIRST, *SECOND, 40]
    assert marked.reuse(prompt) == 16
    read(moe_model, marked, prompt[16:])
    assert np.allclose(next_logits(moe_model, marked), cold(moe_model, prompt), atol=1e-5)
    assert not np.allclose(next_logits(moe_model, marked), cold(moe_model, [*FIRST, *SECOND, 30, 31, 40]), atol=1e-5)


def test_a_mark_inside_an_answer_serves_the_next_prompt_and_no_later_one(moe_model: Model, marked: Transcript) -> None:
    for token_id in (30, 31, 32):
        read(moe_model, marked, [token_id])
        marked.mark_answer()
    prompt = [*FIRST, *SECOND, 30, 31, 40]
    assert marked.reuse(prompt) == 18
    read(moe_model, marked, [40])
    assert np.allclose(next_logits(moe_model, marked), cold(moe_model, prompt), atol=1e-5)
    assert marked.reuse([*FIRST, *SECOND, 30, 31, 41]) == 16


def test_an_answer_that_is_continued_leaves_no_marks(moe_model: Model, marked: Transcript) -> None:
    read(moe_model, marked, [30])
    marked.mark_answer()
    read(moe_model, marked, [31])
    assert marked.reuse([*FIRST, *SECOND, 30, 31, 32]) == 18
    assert marked.reuse([*FIRST, *SECOND, 30, 40]) == 16


def test_a_transcript_may_be_made_in_one_thread_and_continued_in_another(moe_model: Model) -> None:
    mx.eval(moe_model.parameters())
    told = Transcript(moe_model.new_state())
    unready = moe_model.new_state()
    failures: list[RuntimeError] = []

    def go_on(state: State) -> None:
        try:
            mx.eval(moe_model(mx.array([FIRST]), state))
        except RuntimeError as error:
            failures.append(error)

    for state, num_failures in ((told.state, 0), (unready, 1)):
        thread = threading.Thread(target=go_on, args=(state,))
        thread.start()
        thread.join()
        assert len(failures) == num_failures


def test_too_many_marks_thin_out_and_stay_usable(moe_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_MARKS", 8)
    told = Transcript(moe_model.new_state())
    ids = list(range(1, 31))
    for token_id in ids:
        read(moe_model, told, [token_id])
        told.mark()
    assert len(told._marks) <= 8
    num_reused = told.reuse([*ids[:-2], 50])
    assert 20 <= num_reused <= 28
    read(moe_model, told, [*ids[num_reused:-2], 50])
    assert np.allclose(next_logits(moe_model, told), cold(moe_model, [*ids[:-2], 50]), atol=1e-5)


def test_marks_inside_an_answer_have_a_limit(moe_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_ANSWER_MARKS", 2)
    told = Transcript(moe_model.new_state())
    for token_id in (1, 2, 3):
        read(moe_model, told, [token_id])
        told.mark_answer()
    assert told.reuse([1, 2, 3, 4]) == 3
    for token_id in (4, 5, 6):
        read(moe_model, told, [token_id])
        told.mark_answer()
    assert told.reuse([1, 2, 3, 4, 5, 6][:6]) == 5
