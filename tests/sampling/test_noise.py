"""Claims about the random numbers of a row."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.sampling.noise import gumbel_noise, gumbel_of, next_keys, scatter_bits, seed_keys


@pytest.mark.parametrize("vocab_size", [1, 7, 8, 1001])
def test_a_row_of_a_batch_draws_what_its_key_draws_alone(vocab_size):
    keys = seed_keys([11, 12, 11, 2**64 - 1])
    batch = gumbel_noise(keys, vocab_size)
    for row in range(4):
        alone = gumbel_noise(keys[row : row + 1], vocab_size)[0]
        assert mx.array_equal(batch[row], alone)
    assert mx.array_equal(batch[0], batch[2])
    assert not mx.array_equal(batch[0], batch[1])


def test_noise_is_finite_and_has_the_moments_of_a_gumbel_distribution():
    noise = np.array(gumbel_noise(seed_keys([3]), 400_000))
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.02


def test_noise_is_finite_at_both_ends_of_the_uniform_numbers():
    ends = gumbel_of(mx.array([0.0, 2.0**-32, 1 - 2.0**-24])).tolist()
    assert ends == pytest.approx([22.874, 21.775, -2.811], abs=0.01)
    many = mx.random.uniform(shape=(2**24,), key=mx.random.key(0))
    assert 0 <= many.min().item() < many.max().item() <= 1 - 2.0**-24


def test_consecutive_tokens_and_neighbouring_seeds_draw_uncorrelated_noise():
    keys = seed_keys([0, 1])
    first = np.array(gumbel_noise(keys, 100_000))
    second = np.array(gumbel_noise(next_keys(keys), 100_000))
    correlations = np.corrcoef(np.concatenate([first, second])) - np.eye(4)
    assert abs(correlations).max() < 0.015


def test_the_token_count_wraps_without_touching_the_seed_word():
    keys = mx.array([[2**32 - 1, 5]], dtype=mx.uint32)
    assert next_keys(keys).tolist() == [[0, 5]]


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_scattering_seeds_maps_different_seeds_to_different_numbers(one, other):
    assert (scatter_bits(one) == scatter_bits(other)) == (one == other)
    assert 0 <= scatter_bits(one) < 2**64


def test_scattering_seeds_is_splitmix64():
    assert scatter_bits(0) == 0xE220A8397B1DCDAF
