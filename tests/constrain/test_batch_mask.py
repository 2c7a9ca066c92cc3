from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tool_cases import WEATHER

from lfm_mlx.bench.mask_time import allowed_ids
from lfm_mlx.constrain import Choice, GrammarTokenizer, JsonObject, Matcher, Regex, ToolCalls
from lfm_mlx.engine.masks import batch_mask
from lfm_mlx.sampling import Sampler, unpack
from lfm_mlx.types import SamplingParams


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000])
def test_unpacked_bits_are_the_packed_ones(vocab_size: int) -> None:
    packed = np.random.default_rng(0).integers(0, 2**32, size=(3, (vocab_size + 31) // 32), dtype=np.uint32)
    mask = np.array(unpack(mx.array(packed), vocab_size))
    assert mask.shape == (3, vocab_size)
    for row, expected in zip(mask, packed, strict=True):
        ids = allowed_ids(expected)
        assert np.array_equal(np.flatnonzero(row), ids[ids < vocab_size])


def test_each_row_has_its_own_mask_and_a_free_row_none(vocabulary: GrammarTokenizer) -> None:
    constraints = [JsonObject(), None, Choice(["a", "b"]), ToolCalls([WEATHER]), Regex("x+")] * 5
    rows = [None if one is None else Matcher(one, vocabulary) for one in constraints]
    result = batch_mask([matcher and matcher.mask() for matcher in rows], vocabulary.vocab_size)
    assert result is not None
    assert result.dtype == mx.bool_
    for row, matcher in zip(np.array(result), rows, strict=True):
        if matcher is None:
            assert row.all()
        else:
            assert np.array_equal(np.flatnonzero(row), allowed_ids(matcher.mask()))


def test_a_batch_generates_like_its_rows_alone(vocabulary: GrammarTokenizer) -> None:
    constraints = [
        Choice(["yes, of course", "no"]),
        Regex("[0-9]{3,6}"),
        JsonObject(),
        ToolCalls([WEATHER], tool_choice="required"),
    ]
    V = vocabulary.vocab_size
    params = [SamplingParams(temperature=1.5, seed=seed) for seed in range(4)]
    noise = mx.random.normal((12, 4, V), key=mx.random.key(3))

    def run(rows: list[int]) -> list[list[int]]:
        matchers = [Matcher(constraints[row], vocabulary) for row in rows]
        sampler = Sampler([params[row] for row in rows], V)
        state = sampler.start([[0]] * len(rows))
        tokens: list[list[int]] = [[] for _ in rows]
        for step in range(12):
            allowed = batch_mask([matcher.mask() for matcher in matchers], V)
            ids, state = sampler.sample(noise[step][mx.array(rows)], state, allowed)
            for index, token_id in enumerate(np.array(ids).tolist()):
                tokens[index].append(token_id)
                if not matchers[index].is_stopped:
                    matchers[index].accept(token_id)
        return tokens

    assert run([0, 1, 2, 3]) == [run([row])[0] for row in range(4)]
