"""How much of a prompt runs in a step, on made-up machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from lfm_mlx.engine import pace as pace_module
from lfm_mlx.engine.pace import Pace

NUM_LAYERS = 24


@dataclass
class Step:
    """What one step of a machine took for prompts, and the tokens of the chunk that ended in it."""

    prompts_s: float = 0.0
    tokens: int = 0


def run(pace: Pace, decode_s: float, layer_s: Callable[[int, int], float], count: int = 3000) -> list[Step]:
    """So many steps; `layer_s` gives the seconds of a layer for a chunk of so many tokens."""
    steps, layer, tokens = [], 0, 0
    for _ in range(count):
        step = Step()
        pace.begin_step()
        while pace.allows(layer, tokens if layer else pace.chunk_tokens):
            tokens = tokens if layer else pace.chunk_tokens
            step.prompts_s += layer_s(layer, tokens)
            pace.note_layer(layer, tokens, layer_s(layer, tokens))
            layer = (layer + 1) % NUM_LAYERS
            if layer == 0:
                pace.end_chunk(tokens)
                step.tokens = tokens
                break
        pace.end_step(decode_s)
        steps.append(step)
    return steps


@pytest.mark.parametrize("token_s", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("decode_s", [0.01, 0.05])
def test_a_step_with_a_part_of_a_prompt_takes_at_most_twice_as_long(decode_s: float, token_s: float) -> None:
    later = run(Pace(2048), decode_s, lambda layer, n: 0.05 * decode_s + token_s * n)[1000:]
    assert max(step.prompts_s for step in later) <= 1.01 * decode_s
    # The slowest layer nearly fills a step, so little of what does not depend on the chunk is paid twice.
    assert max(step.tokens for step in later) >= min(2048, 0.4 * decode_s / token_s)
    assert sum(step.prompts_s for step in later) >= 0.35 * decode_s * len(later)


def test_layers_of_unequal_cost_run_together_while_they_fit() -> None:
    later = run(Pace(512), 0.01, lambda layer, n: n * (1e-4 if layer % 4 == 2 else 1e-5))[1000:]
    assert max(step.prompts_s for step in later) <= 0.0101
    assert 40 <= max(step.tokens for step in later) <= 75


def test_when_even_one_layer_takes_long_it_is_paid_for() -> None:
    later = run(Pace(2048), 0.01, lambda layer, n: 0.1 + 1e-3 * n, 6000)[1000:]
    assert sum(step.prompts_s for step in later) <= 1.3 * 0.01 * len(later)
    # About as long as its start: half of the work is not lost.
    assert 35 <= max(step.tokens for step in later) <= 400


def hiccup_tokens() -> float:
    """Tokens taken in where one layer in 61 takes 30 times as long, as part of those where none does."""

    def taken(every: int | None) -> int:
        count = 0

        def layer_s(layer: int, num_tokens: int) -> float:
            nonlocal count
            count += 1
            return (30 if every and count % every < 2 else 1) * (5e-4 + 1e-4 * num_tokens)  # `run` asks twice.

        return sum(step.tokens for step in run(Pace(512), 0.01, layer_s, 6000)[1000:])

    return taken(2 * 61) / taken(None)


def test_a_machine_that_stands_still_at_times_takes_nearly_as_much_of_a_prompt() -> None:
    assert hiccup_tokens() > 0.8


def test_control_believing_the_latest_time_takes_in_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "REMEMBERED", 1)
    monkeypatch.setattr(pace_module, "CHUNKS", 1)
    assert hiccup_tokens() < 0.7


def test_the_chunk_follows_a_context_that_makes_a_layer_slower() -> None:
    depth = 0

    def layer_s(layer: int, num_tokens: int) -> float:
        nonlocal depth
        depth += num_tokens if layer == 2 else 0
        return num_tokens * (1e-5 + (1e-8 * depth if layer == 2 else 0.0))

    steps = run(Pace(2048), 0.01, layer_s, 20_000)
    assert max(step.tokens for step in steps) > 100
    assert depth > 30_000
    later = steps[-5_000:]
    fitting = 0.01 / (1e-5 + 1e-8 * depth)
    assert 0.3 * fitting <= max(step.tokens for step in later) <= 2 * fitting
    assert sorted(step.prompts_s for step in later)[-50] <= 0.0101


def test_the_rest_of_a_prompt_does_not_make_chunks_longer() -> None:
    pace = Pace(2048)
    run(pace, 0.01, lambda layer, n: 1e-4 * n)
    pace.rest()
    before = pace.chunk_tokens
    for _ in range(100):
        pace.begin_step()
        pace.note_layer(0, 1, 1e-4)
        pace.end_chunk(1)
        pace.end_step(0.01)
    assert pace.chunk_tokens <= before


def test_nothing_of_a_prompt_runs_before_it_is_known_how_long_decoding_takes() -> None:
    pace = Pace(64)
    pace.begin_step()
    assert not pace.allows(0, pace.chunk_tokens)
    pace.end_step(0.01)
    pace.begin_step()
    assert pace.allows(0, pace.chunk_tokens)
