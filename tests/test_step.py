from __future__ import annotations

import shutil
from collections.abc import Sequence

import mlx.core as mx
import pytest
from random_models import random_tokens, relative_error, tiny_config, tiny_model

from lfm_mlx.errors import ContextLengthError, OptionError
from lfm_mlx.model import Model
from lfm_mlx.sampling import Sampler
from lfm_mlx.step import Stepper, stepper_of
from lfm_mlx.types import SamplingParams

NUM_STEPS = 260
"""Past the first growth of the keys' and values' buffers, at 256 tokens."""

TOLERANCE = 1e-5

PROMPT_LENGTHS = {"one row": [230], "equal rows": [230, 230], "unequal rows": [230, 1, 250]}
NUM_STEPS_BEHIND = 40
"""From these prompts past the first growth too."""

THREE_LAYERS = tiny_config(layer_types=["conv", "full_attention", "conv"], num_hidden_layers=3)
"""Enough to have a first, a last and no middle segment, and experts after the attention."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="mx.compile needs g++ on the CPU, and there is none on the PATH"
)
compiled_or_not = pytest.mark.parametrize(
    "is_compiled", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "compiled"]
)


def padded(rows: Sequence[mx.array]) -> mx.array:
    """Rows of unequal length side by side, padded on the right."""
    longest = max(row.size for row in rows)
    return mx.stack([mx.pad(row, (0, longest - row.size)) for row in rows])


def decoded(stepper: Stepper, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
    """Logits (B, 1 + steps, V) after the prompt and after each further token of rows (B, L)."""
    state = stepper.model.new_state(len(lengths))
    prompts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    logits = [stepper.prefill(state, padded(prompts), lengths)]
    for step in range(tokens.shape[1] - max(lengths)):
        latest = mx.stack([row[length + step] for row, length in zip(tokens, lengths, strict=True)])
        logits.append(stepper.decode(state, latest))
        mx.eval(logits[-1], state.arrays)
    return mx.stack(logits, axis=1)


def at_once(model: Model, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
    """The same logits from one pass of the module tree over each whole row."""
    num_steps = tokens.shape[1] - max(lengths)
    rows = [model(row[None])[0, length - 1 : length + num_steps] for row, length in zip(tokens, lengths, strict=True)]
    return mx.stack(rows)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 64, 2048])
def test_prefill_in_chunks_gives_the_logits_of_the_whole(moe_model: Model, chunk_size: int) -> None:
    tokens = random_tokens(2, 65)
    state = moe_model.new_state(2)
    logits = Stepper(moe_model).prefill(state, tokens, chunk_size=chunk_size)
    expected = moe_model(tokens)
    assert relative_error(logits, expected[:, -1]) < TOLERANCE
    assert relative_error(logits, expected[:, -2]) > 0.1
    assert state.lengths == (65, 65)


@pytest.mark.parametrize("chunk_size", [4, 16, 2048])
def test_prefill_of_unequal_rows_takes_each_rows_last_real_token(moe_model: Model, chunk_size: int) -> None:
    tokens, lengths = random_tokens(3, 33), [33, 1, 16]
    state = moe_model.new_state(3)
    logits = Stepper(moe_model).prefill(state, tokens, lengths, chunk_size=chunk_size)
    expected = mx.stack([moe_model(tokens[row : row + 1, :n])[0, -1] for row, n in enumerate(lengths)])
    assert relative_error(logits, expected) < TOLERANCE
    assert relative_error(logits, moe_model(tokens)[:, -1]) > 0.1
    assert state.lengths == (33, 1, 16)


def test_prefill_goes_on_from_what_the_state_has_seen(moe_model: Model) -> None:
    tokens, stepper, state = random_tokens(1, 40), Stepper(moe_model), moe_model.new_state()
    stepper.prefill(state, tokens[:, :25])
    logits = stepper.prefill(state, tokens[:, 25:])
    expected = moe_model(tokens)[:, -1]
    assert relative_error(logits, expected) < TOLERANCE
    assert relative_error(stepper.prefill(moe_model.new_state(), tokens[:, 25:]), expected) > 0.01


def test_prefill_yields_after_every_chunk_and_logits_with_the_last(moe_model: Model) -> None:
    chunks = list(Stepper(moe_model).prefill_chunks(moe_model.new_state(), random_tokens(1, 33), chunk_size=16))
    assert [logits is None for logits in chunks] == [True, True, False]


@pytest.mark.parametrize("lengths", [[3, 0], [3], [3, 9], [3, -1]])
def test_prefill_refuses_lengths_that_do_not_fit(moe_model: Model, lengths: list[int]) -> None:
    state = moe_model.new_state(2)
    with pytest.raises(OptionError, match=r"lengths is .*, expected 2 whole numbers \(one a row\) from 1 to 8"):
        Stepper(moe_model).prefill(state, random_tokens(2, 8), lengths)
    assert state.lengths == (0, 0)
    Stepper(moe_model).prefill(state, random_tokens(2, 8), [3, 8])
    assert state.lengths == (3, 8)


@compiled_or_not
@pytest.mark.parametrize("lengths", PROMPT_LENGTHS.values(), ids=PROMPT_LENGTHS.keys())
def test_decoding_equals_the_module_tree(lengths: list[int], is_compiled: bool) -> None:
    model = tiny_model(THREE_LAYERS)
    tokens = random_tokens(len(lengths), max(lengths) + NUM_STEPS_BEHIND)
    stepper = Stepper(model, is_compiled=is_compiled)
    logits, expected = decoded(stepper, tokens, lengths), at_once(model, tokens, lengths)
    assert logits.shape == (len(lengths), 1 + NUM_STEPS_BEHIND, 97)
    assert relative_error(logits, expected) < TOLERANCE
    other = mx.concatenate([tokens[:, :-1], (tokens[:, -1:] + 1) % 97], axis=1)
    changed = mx.abs(at_once(model, other, lengths) - expected).max(axis=(0, 2))
    assert changed[-1].item() > 0.1


@compiled_or_not
def test_decoding_a_dense_model_equals_the_module_tree(dense_model: Model, is_compiled: bool) -> None:
    tokens, lengths = random_tokens(2, 60), [5, 20]
    logits = decoded(Stepper(dense_model, is_compiled=is_compiled), tokens, lengths)
    assert relative_error(logits, at_once(dense_model, tokens, lengths)) < TOLERANCE
    assert relative_error(logits, at_once(dense_model, tokens, [6, 20])) > 0.1


@pytest.mark.parametrize("kinds", [["conv"] * 3, ["full_attention"] * 3, ["full_attention", "conv", "conv"]])
def test_decoding_works_wherever_attention_stands(kinds: list[str]) -> None:
    model = tiny_model(tiny_config(layer_types=kinds, num_hidden_layers=3))
    tokens = random_tokens(1, 30)
    logits = decoded(Stepper(model), tokens, [10])
    assert relative_error(logits, at_once(model, tokens, [10])) < TOLERANCE
    assert relative_error(logits, at_once(model, tokens[:, ::-1], [10])) > 0.1


def test_decoding_past_the_context_is_refused() -> None:
    model = tiny_model(tiny_config(max_position_embeddings=8))
    stepper, state = Stepper(model), model.new_state()
    stepper.prefill(state, random_tokens(1, 7))
    stepper.decode(state, mx.array([5]))
    with pytest.raises(ContextLengthError, match="at most 8"):
        stepper.decode(state, mx.array([5]))


@compiled_or_not
def test_decode_and_sample_is_decode_and_then_sample(moe_model: Model, is_compiled: bool) -> None:
    rows = [SamplingParams(temperature=1.2, top_k=20, seed=3, repetition_penalty=1.2), SamplingParams()]
    stepper, sampler = Stepper(moe_model, is_compiled=is_compiled), Sampler(rows, 97)
    prompts = random_tokens(2, 6)
    first, second = moe_model.new_state(2), moe_model.new_state(2)
    logits = stepper.prefill(first, prompts)
    stepper.prefill(second, prompts)
    sampler_state = sampler.start(prompts.tolist())
    ids = sampler.choose(logits, sampler_state)
    other_ids, other_state = ids, {name: array + 0 for name, array in sampler_state.items()}
    drawn = []
    for _ in range(30):
        step = stepper.decode_and_sample(first, ids, sampler, sampler_state)
        ids, sampler_state = step.ids, step.sampler_state
        logits = stepper.decode(second, other_ids)
        assert relative_error(step.logits, logits) < TOLERANCE
        other_state = sampler.advance(other_state, other_ids)
        other_ids = sampler.choose(logits, other_state)
        assert ids.tolist() == other_ids.tolist()
        drawn.append(ids.tolist())
    greedy = [int(mx.argmax(row).item()) for row in logits]
    assert greedy[1] == drawn[-1][1]
    assert len({tuple(ids) for ids in drawn}) > 5
    assert [state.lengths for state in (first, second)] == [(36, 36)] * 2


class _Calls:
    """Counts how often Python runs through a model's head: once a trace when compiled, once a step when not."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        head = type(model).head

        def counted(model: Model, hidden: mx.array) -> mx.array:
            self.number += 1
            return head(model, hidden)

        monkeypatch.setattr(type(model), "head", counted)


def run_steps(stepper: Stepper, sampler: Sampler, num_steps: int) -> list[int]:
    state = stepper.model.new_state()
    sampler_state = sampler.start([[5, 6]])
    ids = sampler.choose(stepper.prefill(state, mx.array([[5, 6]])), sampler_state)
    drawn = []
    for _ in range(num_steps):
        step = stepper.decode_and_sample(state, ids, sampler, sampler_state)
        ids, sampler_state = step.ids, step.sampler_state
        drawn.append(int(ids.item()))
    return drawn


@needs_compiler
def test_a_growing_context_is_traced_once(moe_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(moe_model, monkeypatch)
    sampler = Sampler([SamplingParams()], 97)
    run_steps(Stepper(moe_model, is_compiled=True), sampler, NUM_STEPS)
    compiled_calls, calls.number = calls.number, 0
    run_steps(Stepper(moe_model, is_compiled=False), sampler, 30)
    in_prefill = 1
    assert compiled_calls == in_prefill + 1
    assert calls.number == in_prefill + 30


@needs_compiler
def test_samplers_of_equal_features_share_a_trace_and_keep_their_own_values(
    moe_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _Calls(moe_model, monkeypatch)
    stepper = Stepper(moe_model, is_compiled=True)
    hot, cold = (Sampler([SamplingParams(temperature=t, seed=1)], 97) for t in (2.0, 0.1))
    drawn = [run_steps(stepper, sampler, 20) for sampler in (hot, cold)]
    in_prefill = 2
    assert calls.number == in_prefill + 1
    plain = Stepper(moe_model, is_compiled=False)
    assert drawn == [run_steps(plain, sampler, 20) for sampler in (hot, cold)]
    assert drawn[0] != drawn[1]
    calls.number = 0
    run_steps(stepper, Sampler([SamplingParams(temperature=2.0, min_p=0.1, seed=1)], 97), 5)
    assert calls.number == 1 + 1


@pytest.mark.parametrize(("value", "is_compiled"), [("on", True), ("off", False), ("auto", None), (None, None)])
def test_the_environment_says_whether_steps_are_compiled(
    moe_model: Model, monkeypatch: pytest.MonkeyPatch, value: str | None, is_compiled: bool | None
) -> None:
    if value is None:
        monkeypatch.delenv("LFM_MLX_COMPILE", raising=False)
    else:
        monkeypatch.setenv("LFM_MLX_COMPILE", value)
    on_gpu = mx.default_device().type != mx.cpu
    assert Stepper(moe_model).is_compiled == (on_gpu if is_compiled is None else is_compiled)
    assert Stepper(moe_model, is_compiled=True).is_compiled
    assert not Stepper(moe_model, is_compiled=False).is_compiled


@pytest.mark.parametrize("value", ["yes", "1", ""])
def test_another_value_in_the_environment_is_refused(
    moe_model: Model, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LFM_MLX_COMPILE", value)
    with pytest.raises(OptionError, match=f"LFM_MLX_COMPILE is '{value}', expected auto, on or off"):
        Stepper(moe_model)


def test_a_model_has_one_stepper() -> None:
    model, other = tiny_model(), tiny_model()
    assert stepper_of(model) is stepper_of(model)
    assert stepper_of(model) is not stepper_of(other)
