"""The chunk size, on made-up machines."""

from __future__ import annotations

import pytest

from lfm_mlx.engine.pace import MIN_CHUNK, Pace


def steps(pace: Pace, decode_s: float, start_s: float, token_s: float, count: int = 400) -> list[tuple[float, int]]:
    """Seconds and prompt tokens of so many steps of a machine."""
    taken = []
    for _ in range(count):
        tokens = pace.max_chunk(is_decoding=True)
        seconds = decode_s + (start_s + token_s * tokens if tokens else 0.0)
        pace.note(seconds, tokens)
        taken.append((seconds, tokens))
    return taken


@pytest.mark.parametrize("token_s", [1e-5, 1e-4, 3e-4])
@pytest.mark.parametrize("decode_s", [0.01, 0.05])
def test_a_step_with_a_chunk_takes_about_twice_as_long(decode_s: float, token_s: float) -> None:
    later = steps(Pace(2048), decode_s, 0.2 * decode_s, token_s)[100:]
    assert max(seconds for seconds, _ in later) <= 2.3 * decode_s
    largest = max(tokens for _, tokens in later)
    assert largest >= min(2048, 0.6 * decode_s / token_s)
    assert sum(tokens > 0 for _, tokens in later) >= 0.7 * len(later)


def test_when_even_a_small_chunk_takes_long_it_is_paid_for() -> None:
    later = steps(Pace(2048), 0.01, 0.1, 1e-3)[100:]
    assert sum(seconds for seconds, _ in later) <= 2.3 * 0.01 * len(later)
    # As long as its start: half of the work is not lost.
    assert 60 <= max(tokens for _, tokens in later) <= 160


def test_the_chunk_follows_a_context_that_makes_it_slower() -> None:
    pace = Pace(2048)
    fast = steps(pace, 0.01, 0.001, 1e-5)[-1][1] or steps(pace, 0.01, 0.001, 1e-5, 2)[-1][1]
    slow = [tokens for _, tokens in steps(pace, 0.01, 0.001, 3e-4)[250:] if tokens]
    assert fast > 500
    assert MIN_CHUNK <= min(slow) <= max(slow) < 60


def test_without_running_rows_a_chunk_is_whole() -> None:
    pace = Pace(512)
    steps(pace, 0.01, 0.1, 1e-3)
    assert pace.max_chunk(is_decoding=False) == 512
