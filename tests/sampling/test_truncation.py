"""Claims about thresholds; transformers' warpers are the oracle."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.sampling.options import find_features, parameter_arrays
from lfm_mlx.sampling.sampler import truncate
from lfm_mlx.sampling.truncation import chunk_width, top_k_threshold
from lfm_mlx.types import SamplingParams

VOCAB_SIZE = 1000

ROWS = {
    "top_k": [{"top_k": k} for k in (1, 7, 50, 999, 1000, 5000, 0)],
    "top_p": [{"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)],
    "min_p": [{"min_p": p} for p in (0.0, 1e-4, 0.15, 0.9, 1.0)],
    "all": [
        {"temperature": 0.3, "min_p": 0.15},
        {"temperature": 0.2, "top_k": 80},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_p": 0.95},
        {"temperature": 5.0},
    ],
}


def oracle(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """One row of logits after transformers' warpers, in the order in which `generate` chains them."""
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'lfm-mlx[oracle]')")
    # Takes seconds.
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    from transformers.generation.logits_process import TemperatureLogitsWarper

    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, torch.tensor(logits)[None])[0].numpy()


def truncated(logits, rows):
    """(B, V) logits after our temperature and thresholds."""
    params = [SamplingParams(**({"temperature": 1.0} | row)) for row in rows]
    features = find_features(params, logits.shape[1])
    parameters = parameter_arrays(params, features, logits.shape[1])
    return np.array(truncate(features, mx.array(logits) / parameters["temperature"][:, None], parameters))


def softmax(scores):
    weights = np.exp(np.float64(scores) - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("scale", [0.5, 5.0])
def test_kept_tokens_and_probabilities_are_those_of_transformers(case, scale):
    rows = ROWS[case]
    logits = (np.random.default_rng(0).standard_normal((len(rows), VOCAB_SIZE)) * scale).astype(np.float32)
    ours = truncated(logits, rows)
    for row, options in enumerate(rows):
        theirs = oracle(logits[row], **options)
        np.testing.assert_array_equal(np.isfinite(ours[row]), np.isfinite(theirs))
        np.testing.assert_allclose(softmax(ours[row]), softmax(theirs), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.2}])
def test_other_values_keep_other_tokens(options):
    """The control of the comparison above: a slightly wrong parameter is noticed."""
    logits = np.random.default_rng(1).standard_normal((1, VOCAB_SIZE)).astype(np.float32)
    name, value = next(iter(options.items()))
    wrong = value + 1 if name == "top_k" else value * 1.3
    ours = truncated(logits, [{name: wrong}])[0]
    assert (np.isfinite(ours) != np.isfinite(oracle(logits[0], **options))).any()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=60),
    st.integers(1, 70),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_tokens_tied_at_the_top_k_or_min_p_threshold_are_all_kept_as_in_transformers(levels, top_k, min_p):
    logits = np.array([levels], dtype=np.float32)
    ours = truncated(logits, [{"top_k": top_k, "min_p": min_p}])[0]
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(oracle(logits[0], top_k=top_k, min_p=min_p)))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(-3, 3), min_size=2, max_size=60),
    st.sampled_from([0.0513, 0.3137, 0.5711, 0.9017]),
    st.sampled_from([0, 5]),
)
def test_top_p_keeps_what_transformers_keeps_and_all_that_ties_with_it(levels, top_p, top_k):
    logits = np.array([levels], dtype=np.float32)
    ours = np.isfinite(truncated(logits, [{"top_p": top_p, "top_k": top_k}])[0])
    theirs = np.isfinite(oracle(logits[0], top_p=top_p, top_k=top_k))
    np.testing.assert_array_equal(ours, logits[0] >= logits[0][theirs].min())


def test_a_row_is_bit_unchanged_by_truncation_that_only_its_neighbours_use():
    logits = np.random.default_rng(2).standard_normal((2, VOCAB_SIZE)).astype(np.float32)
    logits[0, :300] -= 200
    for options in ROWS["all"] + ROWS["top_k"] + ROWS["top_p"] + ROWS["min_p"]:
        alone = truncated(logits[:1], [options])[0]
        for neighbour in ROWS["all"] + [{"temperature": 0.0}]:
            np.testing.assert_array_equal(truncated(logits, [options, neighbour])[0], alone)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.data())
def test_top_k_threshold_is_the_kth_largest_score(vocab_size, seed, data):
    ks = data.draw(st.lists(st.integers(0, vocab_size), min_size=1, max_size=3))
    scores = np.random.default_rng(seed).integers(-20, 20, (len(ks), vocab_size)).astype(np.float32)
    found = top_k_threshold(mx.array(scores), mx.array(ks, dtype=mx.int32), max(max(ks), 1))
    expected = [np.sort(row)[-k] if k else -np.inf for row, k in zip(scores, ks, strict=True)]
    assert found[:, 0].tolist() == expected


def test_rows_of_minus_infinity_beyond_a_few_tokens_stay_so():
    logits = np.full((3, VOCAB_SIZE), -np.inf, dtype=np.float32)
    logits[:, [3, 500]] = 1.0
    ours = truncated(logits, [{"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
    np.testing.assert_array_equal(ours, logits)


def test_chunks_of_a_full_vocabulary_leave_few_values_to_sort():
    width = chunk_width(128_000, 80)
    assert 128_000 // width + 80 * width < 8_000
