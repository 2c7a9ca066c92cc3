"""Claims about drawing tokens: greedy rows, distribution, independence of rows, rows that join and leave, graphs."""

import shutil
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.errors import OptionError
from lfm_mlx.sampling import Sampler, advance, choose
from lfm_mlx.sampling.sampler import adjust
from lfm_mlx.types import SamplingParams

VOCAB_SIZE = 200
NUM_STEPS = 12

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on the CPU backend needs g++")

VARIETY = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.2, top_k=80, repetition_penalty=1.05, seed=2),
    SamplingParams(temperature=0.3, min_p=0.15, repetition_penalty=1.05, seed=3),
    SamplingParams(temperature=1.5, top_p=0.9, seed=4),
    SamplingParams(temperature=0.9, top_k=3, top_p=0.9, min_p=0.01, presence_penalty=0.3, penalty_window=3, seed=5),
    SamplingParams(temperature=1.2, frequency_penalty=0.4, repetition_penalty=1.2, penalty_window=9, seed=6),
    SamplingParams(temperature=1.0, logit_bias={7: 3.0, 8: -100.0}, seed=2**64 - 1),
    SamplingParams(logit_bias={7: 100.0}, frequency_penalty=30.0, penalty_window=2),
]
PROMPTS = [[row, row + 1, 5, 5, 9 + row][: row % 6] for row in range(len(VARIETY))]


def logits_of(row, step):
    """Logits that a row meets at a step, whatever batch it is in."""
    return mx.random.normal((VOCAB_SIZE,), key=mx.random.key(1000 * row + step)) * 2


def run(sampler, state, rows, first, last):
    """The tokens (steps, B) of rows known by number, and the state after them."""
    tokens = []
    for step in range(first, last):
        ids, state = sampler.sample(mx.stack([logits_of(row, step) for row in rows]), state)
        tokens.append(ids)
    return np.array(mx.stack(tokens)), state


def start(rows):
    sampler = Sampler([VARIETY[row] for row in rows], VOCAB_SIZE)
    return sampler, sampler.start([PROMPTS[row] for row in rows])


@pytest.fixture(scope="module")
def alone():
    """What each row draws when it is the only one: (steps, rows)."""
    return np.concatenate([run(*start([row]), [row], 0, NUM_STEPS)[0] for row in range(len(VARIETY))], axis=1)


@pytest.mark.parametrize("num_written", [1, 2, 5, NUM_STEPS - 1])
def test_rows_that_start_again_with_an_answer_go_on_as_before(alone, num_written):
    rows = list(range(len(VARIETY)))
    sampler = Sampler([VARIETY[row] for row in rows], VOCAB_SIZE)
    state = sampler.start([PROMPTS[row] for row in rows], [alone[:num_written, row].tolist() for row in rows])
    again, _ = run(sampler, state, rows, num_written, NUM_STEPS)
    assert (again == alone[num_written:]).all()
    other = sampler.start([PROMPTS[row] for row in rows], [alone[: num_written - 1, row].tolist() for row in rows])
    assert (run(sampler, other, rows, num_written, NUM_STEPS)[0] != alone[num_written:]).any()


def test_greedy_rows_take_the_lowest_id_among_the_likeliest():
    sampler = Sampler([SamplingParams(), SamplingParams(temperature=1.0, seed=0)], 4)
    logits = mx.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert sampler.sample(logits, sampler.start([[], []]))[0][0].item() == 1
    plain = Sampler([SamplingParams()] * 2, 4)
    assert plain.sample(logits.astype(mx.bfloat16), plain.start([[], []]))[0].tolist() == [1, 0]


def operations(*outputs, path):
    mx.export_to_dot(str(path), *outputs)
    return [line.split('"')[1] for line in path.read_text().splitlines() if "shape=rectangle" in line]


def test_a_greedy_batch_is_one_argmax(tmp_path):
    sampler = Sampler([SamplingParams(top_k=5, top_p=0.5, seed=1)] * 3, VOCAB_SIZE)
    logits = mx.ones((3, VOCAB_SIZE))
    mx.eval(logits)
    ids, state = sampler.sample(logits, sampler.start([[1]] * 3))
    assert state == {}
    assert set(operations(ids, path=tmp_path / "graph.dot")) == {"ArgReduce", "Squeeze"}


def test_top_k_alone_does_not_sort_the_vocabulary(tmp_path):
    vocab_size = 128_000
    sampler = Sampler([SamplingParams(temperature=0.2, top_k=80, seed=0)], vocab_size)
    logits = mx.random.normal((1, vocab_size), key=mx.random.key(0))
    mx.eval(logits)
    names = operations(sampler.choose(logits, sampler.start([[]])), path=tmp_path / "graph.dot")
    assert names.count("Sort") == names.count("ArgSort") == 1
    assert "Softmax" not in names


def test_tokens_do_not_depend_on_the_batch_the_row_or_the_neighbours(alone):
    for rows in ([*range(len(VARIETY))], [9, 3, 0, 5], [2, 2, 8], [6, 4]):
        tokens, _ = run(*start(rows), rows, 0, NUM_STEPS)
        np.testing.assert_array_equal(tokens, alone[:, rows])


def test_another_seed_or_position_draws_other_tokens():
    """The control of the test above: the draws are not all the same for a trivial reason."""
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    sampler = Sampler(params, VOCAB_SIZE)
    state = sampler.start([[]] * 3)
    tokens = []
    for _ in range(20):
        ids, state = sampler.sample(mx.zeros((3, VOCAB_SIZE)), state)
        tokens.append(ids.tolist())
    first, twin, other = zip(*tokens, strict=True)
    assert first == twin
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 2
    assert len(set(first)) > 12


def test_without_a_seed_a_fresh_one_is_drawn_and_reported():
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0)]
    sampler = Sampler(params, VOCAB_SIZE)
    assert sampler.seeds[0] != sampler.seeds[1]
    repeated = Sampler([SamplingParams(temperature=1.0, seed=seed) for seed in sampler.seeds], VOCAB_SIZE)
    logits = mx.zeros((2, VOCAB_SIZE))
    ours, theirs = (one.sample(logits, one.start([[], []]))[0] for one in (sampler, repeated))
    assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.49}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "logit_bias": {3: float(np.log(2))}}, [4 / 11, 3 / 11, 2 / 11, 2 / 11]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(options, probabilities):
    num_rows = 20_000
    sampler = Sampler([SamplingParams(seed=seed, **options) for seed in range(num_rows)], 4)
    logits = mx.broadcast_to(mx.log(mx.array([0.4, 0.3, 0.2, 0.1])), (num_rows, 4))
    ids = np.array(sampler.sample(logits, sampler.start([[]] * num_rows))[0])
    observed = np.bincount(ids, minlength=4)
    assert chi_square(observed, probabilities) < 16.3  # p = 0.001 at three degrees of freedom
    assert chi_square(observed, np.roll(probabilities, 1)) > 1000


def chi_square(observed, probabilities):
    expected = np.array(probabilities) * observed.sum()
    if observed[expected == 0].any():
        return np.inf
    possible = expected > 0
    return (((observed - expected) ** 2)[possible] / expected[possible]).sum()


def test_successive_tokens_of_one_row_are_drawn_with_their_probabilities():
    sampler = Sampler([SamplingParams(temperature=1.0, seed=5)], 4)
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.1]]))
    state = sampler.start([[]])
    drawn = []
    for _ in range(3000):
        ids, state = sampler.sample(logits, state)
        mx.eval(ids, state)
        drawn.append(ids)
    observed = np.bincount(np.array(mx.concatenate(drawn)), minlength=4)
    assert chi_square(observed, [0.4, 0.3, 0.2, 0.1]) < 16.3


def test_rows_that_stay_when_others_leave_continue_as_if_alone(alone):
    rows = [*range(len(VARIETY))]
    sampler, state = start(rows)
    _, state = run(sampler, state, rows, 0, 4)
    for kept in ([7, 2, 0], [9], [0], [3, 6, 1, 1]):
        smaller, smaller_state = sampler.keep(state, kept)
        tokens, _ = run(smaller, smaller_state, kept, 4, NUM_STEPS)
        np.testing.assert_array_equal(tokens, alone[4:, kept])


def test_rows_that_lose_their_state_do_not_continue_as_if_alone(alone):
    """The control of the test above."""
    tokens, _ = run(*start([7, 2, 0]), [7, 2, 0], 4, NUM_STEPS)
    assert (tokens != alone[4:, [7, 2, 0]]).any(axis=0).tolist() == [True, True, False]


@pytest.mark.parametrize(("first", "second"), [([0], [7]), ([6, 2], [0, 7, 9]), ([3], [3]), ([0], [0]), ([7], [6, 8])])
def test_rows_that_join_at_different_times_continue_as_if_alone(alone, first, second):
    sampler, state = start(first)
    _, state = run(sampler, state, first, 0, 5)
    newcomer, new_state = start(second)
    _, new_state = run(newcomer, new_state, second, 0, 2)
    sampler, state = sampler.join(state, newcomer, new_state)
    assert sampler.num_rows == len(first) + len(second)
    for step in range(2, 7):
        logits = [logits_of(row, step + 3) for row in first] + [logits_of(row, step) for row in second]
        ids, state = sampler.sample(mx.stack(logits), state)
        expected = [*alone[step + 3, first], *alone[step, second]]
        assert ids.tolist() == expected


def test_a_batch_after_keep_needs_only_the_features_of_those_who_stayed():
    sampler, state = start([*range(len(VARIETY))])
    greedy, greedy_state = sampler.keep(state, [0])
    assert greedy.features == Sampler([SamplingParams()], VOCAB_SIZE).features
    assert greedy_state == {}
    windowed, windowed_state = sampler.keep(state, [6])
    assert windowed_state["recent"].shape == (1, 3)
    assert windowed.seeds == (5,)


def test_only_allowed_tokens_are_drawn(alone):
    rows = [*range(len(VARIETY))]
    sampler, state = start(rows)
    allowed = mx.arange(VOCAB_SIZE)[None] % (2 + mx.array(rows)[:, None]) == 1
    for step in range(NUM_STEPS):
        ids, state = sampler.sample(mx.stack([logits_of(row, step) for row in rows]), state, allowed)
        assert all(token % (2 + row) == 1 for row, token in enumerate(ids.tolist()))
    sampler, state = start(rows)
    ids, _ = sampler.sample(mx.stack([logits_of(row, 0) for row in rows]), state, mx.ones_like(allowed))
    assert ids.tolist() == alone[0].tolist()


def test_a_single_allowed_token_is_drawn_whatever_the_logits_and_options():
    rows = [*range(len(VARIETY))]
    sampler, state = start(rows)
    allowed = mx.arange(VOCAB_SIZE)[None] == mx.array(rows)[:, None] + 50
    logits = mx.stack([logits_of(row, 0) for row in rows]) * 1000
    assert sampler.choose(logits, state, allowed).tolist() == [row + 50 for row in rows]


EXTREMES = {
    "temperature": (1e-300, 1e-6, 1e-5, 1e300),
    "repetition_penalty": (1e-300, 1e300),
    "presence_penalty": (-1e300, 1e300),
    "frequency_penalty": (-1e300, 1e300),
    "top_p": (1e-300, 1 - 2**-53),
    "min_p": (1e-300, 1.0),
    "logit_bias": ({2: 1e300, 3: 1e300}, {0: -1e300}),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EXTREMES.items() for value in values])
@pytest.mark.parametrize("temperature", [1e-5, 1e300])
def test_extreme_options_still_draw_a_token_that_may_be_drawn(name, value, temperature):
    options = {"temperature": temperature, "top_p": 0.99, "min_p": 1e-3, "seed": 0} | {name: value}
    sampler = Sampler([SamplingParams(**options)], 6)
    state = sampler.start([[2, 0]])
    logits = mx.array([[900.0, 50.0, 100.0, 0.0, -40.0, -50.0]])
    allowed = mx.array([[False, False, True, True, True, False]])
    for _ in range(5):
        ids, state = sampler.sample(logits, state, allowed)
        assert ids.item() in {2, 3, 4}
        assert mx.isfinite(adjust(sampler.features, logits, state, sampler.parameters, allowed)[0, 2:5]).all()


def test_a_forced_token_is_counted_like_a_drawn_one():
    sampler, state = start([7])
    logits = logits_of(7, 0)[None]
    ids, after = sampler.sample(logits, state)
    forced = sampler.advance(state, ids)
    assert all(mx.array_equal(after[name], forced[name]) for name in after)
    other = sampler.advance(state, ids + 1)
    assert not mx.array_equal(after["context_counts"], other["context_counts"])


@pytest.mark.parametrize("looks_at_a_value", [False, True])
def test_three_steps_are_one_graph_without_evaluation(looks_at_a_value):
    rows = [*range(len(VARIETY))]
    sampler, state = start(rows)
    weights = mx.random.normal((VOCAB_SIZE, VOCAB_SIZE), key=mx.random.key(0))

    def three_steps(weights, after_step):
        step_state = state
        ids = mx.array(rows)
        for _ in range(3):
            ids, step_state = sampler.sample(weights[ids], step_state)
            after_step(ids)
        return ids

    # An array under a transformation holds no data: whoever looks at its value is refused.
    traced = mx.vmap(lambda weights: three_steps(weights, mx.eval if looks_at_a_value else lambda ids: None))
    if looks_at_a_value:
        with pytest.raises(ValueError, match="eval an array during function transformations"):
            traced(weights[None])
    else:
        assert mx.array_equal(traced(weights[None])[0], three_steps(weights, mx.eval))


@needs_compiler
def test_compiled_sampling_equals_eager_and_is_traced_once_for_fifty_steps():
    rows = [*range(len(VARIETY))]
    num_traces = 0
    sampler, state = start(rows)

    def step(logits, state):
        nonlocal num_traces
        num_traces += 1
        return sampler.sample(logits, state)

    compiled = mx.compile(step)
    compiled_state = state
    for number in range(50):
        logits = mx.stack([logits_of(row, number) for row in rows])
        ids, state = sampler.sample(logits, state)
        compiled_ids, compiled_state = compiled(logits, compiled_state)
        assert mx.array_equal(ids, compiled_ids)
    assert num_traces == 1
    assert all(mx.array_equal(state[name], compiled_state[name]) for name in state)


@needs_compiler
def test_samplers_of_equal_features_share_a_compiled_graph():
    first = Sampler([SamplingParams(temperature=1.0, top_k=9, repetition_penalty=1.1, seed=1)], VOCAB_SIZE)
    second = Sampler([SamplingParams(temperature=0.2, top_k=9, repetition_penalty=1.9, seed=2)], VOCAB_SIZE)
    assert first.features == second.features
    num_traces = 0

    def step(features, logits, state, parameters):
        nonlocal num_traces
        num_traces += 1
        ids = choose(features, logits, state, parameters)
        return ids, advance(features, state, parameters, ids)

    compiled = mx.compile(partial(step, first.features))
    for sampler in (first, second):
        state = sampler.start([[3, 4]])
        for number in range(5):
            logits = logits_of(0, number)[None]
            expected = sampler.choose(logits, state)
            ids, state = compiled(logits, state, sampler.parameters)
            assert ids.item() == expected.item()
    assert num_traces == 1


def test_a_full_vocabulary_of_128000_tokens_is_sampled():
    vocab_size = 128_000
    params = [VARIETY[3], VARIETY[5], SamplingParams()]
    sampler = Sampler(params, vocab_size)
    logits = mx.random.normal((3, vocab_size), key=mx.random.key(1)) * 3
    logits[:, 127_999] = 60.0
    ids, state = sampler.sample(logits.astype(mx.bfloat16), sampler.start([[1, 127_999], [], []]))
    assert ids.tolist() == [127_999] * 3
    assert state["context_counts"][0, 127_999].item() == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sampler([], 10), "params is empty"),
        (lambda: Sampler([SamplingParams(logit_bias={10: 1.0})], 10), "logit_bias has token id 10"),
        (lambda: Sampler([SamplingParams()], 10).start([]), "0 prompts were given"),
        (lambda: Sampler([SamplingParams()], 10).start([[3, 10]]), "prompt of row 0 has token ids from 3 to 10"),
        (lambda: Sampler([SamplingParams()], 10).sample(mx.zeros((1, 9)), {}), r"logits are \(1, 9\)"),
        (
            lambda: Sampler([SamplingParams()], 10).join({}, Sampler([SamplingParams()], 9), {}),
            "other has a vocabulary of 9",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call()
