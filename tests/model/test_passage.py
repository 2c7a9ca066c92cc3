"""A chunk that goes through the layers in parts, or of which only the end is wanted."""

from __future__ import annotations

import mlx.core as mx
import pytest
from random_models import random_tokens, relative_error, tiny_config, tiny_model

from lfm_mlx.errors import ContextLengthError
from lfm_mlx.model import Model, Passage


@pytest.fixture(scope="module")
def model() -> Model:
    built = tiny_model(tiny_config())
    mx.eval(built.parameters())
    return built


@pytest.mark.parametrize("at_once", [1, 3, 9])
@pytest.mark.parametrize("lengths", [None, [40, 3]])
def test_layers_that_run_in_parts_compute_the_same(model: Model, at_once: int, lengths: list[int] | None) -> None:
    tokens = random_tokens(2, 40)
    whole, parts = model.new_state(2), model.new_state(2)
    expected = model.hidden(tokens, whole, lengths=lengths)
    passage = Passage(model, tokens, parts, lengths)
    num_calls = 0
    while not passage.is_done:
        assert parts.lengths == (0, 0)
        passage.run(at_once)
        mx.eval(passage.arrays)
        num_calls += 1
    assert num_calls == -(-len(model.layers) // at_once)
    assert parts.lengths == whole.lengths
    assert mx.array_equal(passage.normed, expected)
    pairs = zip(parts.arrays, whole.arrays, strict=True)
    assert all(mx.array_equal(one, other) for one, other in pairs)
    # Control: one layer fewer is not the same.
    short = Passage(model, tokens, model.new_state(2), lengths)
    short.run(len(model.layers) - 1)
    assert not mx.array_equal(short.normed, expected)


@pytest.mark.parametrize("lengths", [None, [40, 3], [0, 17]])
def test_the_last_token_alone_is_the_last_of_all_and_the_state_the_same(
    model: Model, lengths: list[int] | None
) -> None:
    tokens = random_tokens(2, 40)
    whole, short = model.new_state(2), model.new_state(2)
    expected = model.hidden(tokens, whole, lengths=lengths)
    passage = Passage(model, tokens, short, lengths, is_last_wanted=True)
    passage.run(len(model.layers))
    assert passage.normed.shape == (2, 1, model.config.hidden_size)
    for row, count in enumerate(lengths or [40, 40]):
        if count:
            assert relative_error(passage.normed[row, 0], expected[row, count - 1]) < 1e-6
            assert relative_error(passage.normed[row, 0], expected[row, count - 2]) > 1e-2
    pairs = zip(short.arrays, whole.arrays, strict=True)
    assert all(mx.array_equal(one, other) for one, other in pairs)


def test_what_outgrows_the_context_is_refused_before_anything_is_computed(model: Model) -> None:
    state = model.new_state()
    with pytest.raises(ContextLengthError, match="2,049 tokens"):
        Passage(model, random_tokens(1, 2049), state)
    assert state.lengths == (0,)
