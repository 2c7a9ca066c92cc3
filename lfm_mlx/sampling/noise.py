"""Random numbers of a row that depend on its seed and on how many tokens it has drawn, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

UINT64 = 2**64 - 1
HALF_STEP = 2.0**-33
"""Half the distance between the smallest uniform numbers of MLX; it keeps zero out of the logarithm."""


def seed_keys(seeds: Sequence[int], counts: Sequence[int] | None = None) -> mx.array:
    """The (B, 2) uint32 key of each row's next token, from seeds of up to 64 bits and how many tokens were drawn.

    Seeds are scattered first (SplitMix64, one to one), so that neighbouring seeds never share a key within 2**32 tokens
    except by a chance of about 2**-64 a token.
    """
    mixed = [scatter_bits(seed) for seed in seeds]
    drawn = counts if counts is not None else [0] * len(mixed)
    words = [[(number + count) & 0xFFFFFFFF, number >> 32] for number, count in zip(mixed, drawn, strict=True)]
    return mx.array(words, dtype=mx.uint32)


def next_keys(keys: mx.array) -> mx.array:
    """The keys of each row's next token: the low word counts tokens, modulo 2**32."""
    return keys + mx.array([1, 0], dtype=mx.uint32)


def gumbel_noise(keys: mx.array, vocab_size: int) -> mx.array:
    """Standard Gumbel noise; the largest of score + noise is a draw from softmax(score).

    Every value is finite, from -2.9 to 22.9. Large values, which decide about unlikely tokens, come from small uniform
    numbers, where MLX's steps are 2**-32; so probabilities down to about 1e-9 are honoured.

    Args:
        keys: (B, 2) uint32.
        vocab_size: V.

    Returns:
        (B, V) float32; each row equals the draw from its key alone.
    """
    # Bounds given as numbers would be cast on the device in every call.
    low, high = mx.array(0.0), mx.array(1.0)
    draw = mx.vmap(lambda key: mx.random.uniform(low, high, shape=(vocab_size,), key=key))
    return gumbel_of(draw(keys))


def gumbel_of(uniform: mx.array) -> mx.array:
    """Gumbel noise of uniform numbers from 0 to 1 - 2**-24, both included: finite, and falling as they rise."""
    return -mx.log(-mx.log1p(-(uniform + HALF_STEP)))


def scatter_bits(number: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014): a one-to-one map of 64-bit numbers that changes half of the bits."""
    number = (number + 0x9E3779B97F4A7C15) & UINT64
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & UINT64
    return number ^ (number >> 31)
