"""The loop guard: what it notices, how soon, and what it leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from itertools import cycle, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_texts import LoopText, loop_texts, ordinary_texts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.loop_guard import LoopGuard

ORDINARY = ordinary_texts()
LOOPS = loop_texts()

Encode = Callable[[str], list[int]]

MAX_PERIOD = 4096
"""The guard's default; a page of characters may be longer."""


@pytest.fixture(scope="module")
def encodings() -> dict[str, Encode]:
    """Long tokens and short ones: a byte-pair encoding of these texts, and one token a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*ORDINARY.values(), *(text.start for text in LOOPS.values())], trainer)
    return {"pairs": lambda text: tokenizer.encode(text).ids, "characters": lambda text: [ord(c) for c in text]}


def tokens_until_noticed(guard: LoopGuard, tokens: Iterable[int]) -> int | None:
    """How many tokens the guard saw when it was certain of a loop, None if it never was."""
    return next((n for n, token in enumerate(tokens, 1) if guard.observe(token)), None)


def delay(text: LoopText, encode: Encode) -> int | None:
    """Tokens of the loop, without those before it, until it is noticed."""
    num_before = len(encode(text.start))
    noticed = tokens_until_noticed(LoopGuard(), encode(text.start + text.loop))
    assert noticed is None or noticed > num_before, "noticed before it began"
    return None if noticed is None else noticed - num_before


def random_tokens(num_tokens: int, num_different: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(num_different) for _ in range(num_tokens)]


def verbatim_bound(period: int) -> int:
    """Tokens of a verbatim loop until it is noticed: a first cycle, two more, 1,024 tokens, and two looks."""
    return 3 * period + 1024 + 64


@pytest.mark.parametrize("encoding", ["pairs", "characters"])
def test_no_ordinary_text_is_taken_for_a_loop(encodings: dict[str, Encode], encoding: str) -> None:
    encode = encodings[encoding]
    assert len(ORDINARY) >= 40
    assert [name for name, text in ORDINARY.items() if tokens_until_noticed(LoopGuard(), encode(text))] == []


def test_a_hasty_guard_does_take_ordinary_texts_for_loops(encodings: dict[str, Encode]) -> None:
    encode = encodings["pairs"]
    hasty = [text for text in ORDINARY.values() if tokens_until_noticed(LoopGuard(min_tokens=32), encode(text))]
    assert len(hasty) >= 5


@pytest.mark.parametrize("name", LOOPS)
def test_every_loop_is_noticed_in_byte_pairs(encodings: dict[str, Encode], name: str) -> None:
    noticed = delay(LOOPS[name], encodings["pairs"])
    assert noticed is not None
    assert noticed <= 10_000


def test_every_loop_within_reach_is_noticed_in_characters(encodings: dict[str, Encode]) -> None:
    encode = encodings["characters"]
    within_reach = {name: text for name, text in LOOPS.items() if len(text.loop) / text.num_cycles < MAX_PERIOD}
    assert len(within_reach) >= 40
    assert [name for name, text in within_reach.items() if delay(text, encode) is None] == []


def test_prose_before_a_loop_does_not_delay_it(encodings: dict[str, Encode]) -> None:
    for name in ("wait", "hmm", "code line"):
        at_once, late = (delay(LOOPS[n], encodings["pairs"]) for n in (name, f"{name} after prose"))
        assert at_once is not None
        assert late is not None
        assert abs(late - at_once) <= 64


@settings(max_examples=15, deadline=None)
@given(
    period=st.integers(1, 1500),
    num_different=st.sampled_from([2, 50, 60_000]),
    num_before=st.integers(0, 700),
    seed=st.integers(0, 2**32),
)
def test_a_verbatim_cycle_of_any_period_is_noticed_in_time(
    period: int, num_different: int, num_before: int, seed: int
) -> None:
    before = random_tokens(num_before, 60_000, seed)
    loop = random_tokens(period, num_different, seed + 1)
    guard = LoopGuard()
    # Few symbols stand together in wrong places too, which costs some jumps at the beginning.
    bound = verbatim_bound(period) + (256 if num_different == 2 else 0)
    noticed = tokens_until_noticed(guard, [*before, *islice(cycle(loop), bound)])
    assert noticed is not None
    assert noticed > num_before + 1024
    if num_different == 60_000 and period > 3:
        assert guard.period == period
        assert guard.repeats >= 2


@settings(max_examples=10, deadline=None)
@given(num_different=st.integers(2, 100_000), seed=st.integers(0, 2**32))
def test_random_tokens_are_never_a_loop(num_different: int, seed: int) -> None:
    assert tokens_until_noticed(LoopGuard(), random_tokens(4000, num_different, seed)) is None


@pytest.mark.parametrize("period", [2000, 4096])
def test_the_longest_cycle_is_noticed_and_a_longer_one_is_not(period: int) -> None:
    loop = random_tokens(period, 60_000, seed=period) * 5
    assert tokens_until_noticed(LoopGuard(max_period=period), loop)
    assert tokens_until_noticed(LoopGuard(max_period=period - 1), loop) is None


def test_a_text_repeated_once_or_twice_is_no_loop() -> None:
    text = random_tokens(3000, 60_000, seed=1)
    assert tokens_until_noticed(LoopGuard(), text * 2) is None
    assert tokens_until_noticed(LoopGuard(), text * 3) is None
    assert tokens_until_noticed(LoopGuard(), text * 4)


def test_without_tolerance_only_verbatim_loops_are_noticed(encodings: dict[str, Encode]) -> None:
    counter = encodings["pairs"](LOOPS["counter in a paragraph"].loop)
    assert tokens_until_noticed(LoopGuard(tolerance=0), counter) is None
    assert tokens_until_noticed(LoopGuard(), counter)
    assert tokens_until_noticed(LoopGuard(tolerance=0), encodings["pairs"](LOOPS["hmm"].loop))


def test_more_tokens_and_more_repeats_are_waited_for_if_asked() -> None:
    loop = random_tokens(40, 60_000, seed=2) * 200
    for num_tokens, num_repeats in ((64, 1), (64, 8), (1024, 8), (4096, 8)):
        noticed = tokens_until_noticed(LoopGuard(min_tokens=num_tokens, min_repeats=num_repeats), loop)
        assert noticed is not None
        assert 0 <= noticed - (num_tokens + (num_repeats + 1) * 40) <= 32


def test_a_loop_stays_certain_until_the_guard_is_reset() -> None:
    guard = LoopGuard()
    assert tokens_until_noticed(guard, [7] * 1200)
    assert (guard.period, guard.observe(8)) == (1, True)
    guard.reset()
    assert (guard.period, guard.repeats) == (0, 0)
    assert not guard.observe(7)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), period=st.integers(1, 300))
def test_a_reset_guard_behaves_like_a_new_one(seed: int, period: int) -> None:
    loop = list(islice(cycle(random_tokens(period, 500, seed)), verbatim_bound(period)))
    used, new = LoopGuard(), LoopGuard()
    for token in loop[: seed % len(loop)]:
        used.observe(token)
    used.reset()
    assert tokens_until_noticed(used, loop) == tokens_until_noticed(new, loop)


def test_memory_is_bounded() -> None:
    guard = LoopGuard(max_period=64)
    for token in random_tokens(5000, 60_000, seed=4):
        guard.observe(token)
        assert len(guard._tokens) <= 3 * 64
        assert len(guard._places) <= 2 * 3 * 64


def test_forgetting_old_tokens_changes_no_verdict() -> None:
    loop = random_tokens(50, 60_000, seed=5)
    delays = [
        tokens_until_noticed(LoopGuard(max_period=max_period), random_tokens(999, 60_000, seed=6) + loop * 40)
        for max_period in (64, 128, 4096)
    ]
    assert None not in delays
    assert max(delays) - min(delays) <= 16  # type: ignore[type-var, operator]


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_tokens", 0), ("min_repeats", 0), ("tolerance", -0.1), ("tolerance", 0.5), ("max_period", 8)],
)
def test_an_option_out_of_range_is_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=option):
        LoopGuard(**{option: value})  # type: ignore[arg-type]
