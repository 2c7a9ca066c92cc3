"""Claims about penalties; transformers and a plain recount of the window are the oracles."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.sampling import Sampler
from lfm_mlx.sampling.penalties import apply_repetition, count_tokens
from lfm_mlx.sampling.sampler import adjust
from lfm_mlx.types import SamplingParams

VOCAB_SIZE = 12


def window_counts(prompt, answer, window):
    """Counts of all tokens and of generated tokens among the last `window` tokens, counted afresh."""
    marked = [(token, False) for token in prompt] + [(token, True) for token in answer]
    latest = marked[-window:] if window else marked
    context = Counter(token for token, _ in latest)
    generated = Counter(token for token, is_answer in latest if is_answer)
    return [context[token] for token in range(VOCAB_SIZE)], [generated[token] for token in range(VOCAB_SIZE)]


@pytest.mark.parametrize("penalty", [1.05, 1.5, 0.8])
def test_repetition_penalty_equals_transformers(penalty):
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'lfm-mlx[oracle]')")
    from transformers import RepetitionPenaltyLogitsProcessor  # takes seconds

    logits = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    seen = [[1, 2, 2, 40], [0, 0, 0, 49]]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), torch.tensor(logits)).numpy()
    ours = apply_repetition(mx.array(logits), count_tokens(seen, 50), mx.array([penalty, penalty]))
    np.testing.assert_allclose(np.array(ours), theirs, rtol=1e-6)
    without = apply_repetition(mx.array(logits), count_tokens([[], []], 50), mx.array([penalty, penalty]))
    assert mx.array_equal(without, mx.array(logits))
    assert np.abs(np.array(without) - theirs).max() > 1e-3


row_strategy = st.tuples(
    st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9),
    st.one_of(st.none(), st.integers(1, 8)),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(row_strategy, min_size=1, max_size=3), st.integers(0, 14), st.integers(0, 1000))
def test_counts_are_those_of_the_window_after_every_token(rows, num_tokens, seed):
    params = [SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, penalty_window=window) for _, window in rows]
    sampler = Sampler(params, VOCAB_SIZE)
    prompts = [prompt for prompt, _ in rows]
    answer = np.random.default_rng(seed).integers(0, VOCAB_SIZE, (num_tokens, len(rows)))
    state = sampler.start(prompts)
    for step in range(num_tokens + 1):
        for row, (prompt, window) in enumerate(rows):
            context, generated = window_counts(prompt, answer[:step, row].tolist(), window)
            assert state["context_counts"][row].tolist() == context
            assert state["answer_counts"][row].tolist() == generated
        if step < num_tokens:
            state = sampler.advance(state, mx.array(answer[step].astype(np.uint32)))


def test_presence_and_frequency_see_generated_tokens_only_and_repetition_sees_the_prompt():
    params = [
        SamplingParams(presence_penalty=0.5),
        SamplingParams(frequency_penalty=0.25),
        SamplingParams(presence_penalty=-0.5, frequency_penalty=0.25),
        SamplingParams(repetition_penalty=2.0),
    ]
    sampler = Sampler(params, VOCAB_SIZE)
    state = sampler.start([[1, 1, 2]] * 4)
    for token in (2, 3, 3):
        state = sampler.advance(state, mx.array([token] * 4, dtype=mx.uint32))
    logits = mx.ones((4, VOCAB_SIZE))
    change = adjust(sampler.features, logits, state, sampler.parameters, None) - logits
    assert change[:, :5].tolist() == [
        [0, 0, -0.5, -0.5, 0],
        [0, 0, -0.25, -0.5, 0],
        [0, 0, 0.25, 0, 0],
        [0, -0.5, -0.5, -0.5, 0],
    ]


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (SamplingParams(), set()),
        (SamplingParams(penalty_window=5), set()),
        (SamplingParams(temperature=1.0), {"keys"}),
        (SamplingParams(repetition_penalty=1.1), {"context_counts"}),
        (SamplingParams(frequency_penalty=1.1), {"answer_counts"}),
        (SamplingParams(presence_penalty=1.1, penalty_window=5), {"answer_counts", "recent", "index"}),
    ],
)
def test_only_what_a_feature_needs_is_allocated(params, names):
    assert set(Sampler([params], VOCAB_SIZE).start([[1, 2]])) == names


def test_counts_are_updated_in_place():
    vocab_size = 1_000_000
    sampler = Sampler([SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1, penalty_window=4)], vocab_size)
    state = sampler.start([[1, 2, 3]])
    mx.eval(state)

    def peak_bytes(held):
        nonlocal state
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        state = sampler.advance(state, mx.array([5], dtype=mx.uint32))
        mx.eval(state)
        assert held is None or held
        return mx.get_peak_memory() - before

    assert peak_bytes(None) < vocab_size
    assert peak_bytes(dict(state)) >= 2 * 4 * vocab_size
