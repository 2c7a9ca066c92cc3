"""Claims about log-probabilities."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.sampling import logprobs
from lfm_mlx.sampling.logprobs import largest_ids


@pytest.fixture(scope="module")
def torch():
    """Takes seconds to import."""
    return pytest.importorskip("torch", reason="torch is not installed (pip install 'lfm-mlx[oracle]')")


@pytest.mark.parametrize("top", [0, 1, 5, 1000])
def test_values_are_the_log_softmax_of_the_raw_logits(top, torch):
    logits = (np.random.default_rng(0).standard_normal((3, 1000)) * 4).astype(np.float32)
    ids = [0, 999, 5]
    expected = torch.tensor(logits).log_softmax(-1)
    found = logprobs(mx.array(logits), mx.array(ids, dtype=mx.uint32), top)
    np.testing.assert_allclose(np.array(found.chosen), expected.numpy()[range(3), ids], rtol=1e-5)
    values, top_ids = expected.topk(top, dim=-1)
    np.testing.assert_array_equal(np.array(found.top_ids), top_ids.numpy())
    np.testing.assert_allclose(np.array(found.top_values), values.numpy(), rtol=1e-5, atol=1e-6)


def test_low_precision_logits_are_taken_to_float32_first(torch):
    logits = mx.random.normal((1, 500), key=mx.random.key(0)).astype(mx.bfloat16)
    found = logprobs(logits, mx.array([7], dtype=mx.uint32), 2)
    expected = torch.tensor(logits.astype(mx.float32).tolist()).log_softmax(-1)[0, 7]
    assert found.chosen.dtype == mx.float32
    np.testing.assert_allclose(found.chosen.item(), expected.item(), rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.sampled_from([4, 40]), st.data())
def test_equal_scores_are_listed_by_id(vocab_size, seed, num_levels, data):
    count = data.draw(st.integers(1, vocab_size))
    scores = np.random.default_rng(seed).integers(0, num_levels, (2, vocab_size)).astype(np.float32)
    expected = np.argsort(-scores, axis=-1, kind="stable")[:, :count]
    np.testing.assert_array_equal(np.array(largest_ids(mx.array(scores), count)), expected)
