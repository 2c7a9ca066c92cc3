"""The policy, in whole numbers: requests that come, grow, end and are cancelled at random."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_mlx.engine.scheduler import HEADROOM_TOKENS, MAX_OVERTAKEN, Chunk, Places, Scheduler


def bytes_of(num_tokens: int) -> int:
    """Ten bytes a token, in steps of 256 tokens."""
    return 10 * 256 * -(-num_tokens // 256)


class World:
    """Does what a scheduler plans, and checks what it promises."""

    def __init__(self, *, max_rows: int = 4, budget_bytes: int | None = None, padding_bytes: int | None = None) -> None:
        self.scheduler = Scheduler(
            max_rows=max_rows, budget_bytes=budget_bytes, bytes_of=bytes_of, padding_bytes=padding_bytes
        )
        self.groups: dict[int, set[int]] = {}
        self.prompts: dict[int, int] = {}
        self.answers: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.computed: dict[int, int] = {}
        self.admitted: list[int] = []
        self.decoding: list[int] = []
        self.num_sent_back = 0
        self.ended_at: dict[int, int] = {}
        self.num_steps = 0

    def add(self, prompt: int, answer: int) -> int:
        number = len(self.prompts)
        self.prompts[number], self.answers[number], self.written[number] = prompt, answer, 0
        self.scheduler.add(number, prompt)
        return number

    def end(self, number: int) -> None:
        self.scheduler.remove(number)
        self.ended_at[number] = self.num_steps
        self.drop(number)

    def drop(self, number: int) -> None:
        for places in (self.admitted, self.decoding):
            if number in places:
                places.remove(number)
        self.computed.pop(number, None)
        self.groups = {group: left for group, rows in self.groups.items() if (left := rows - {number})}

    @property
    def live(self) -> list[int]:
        return [number for number in self.prompts if number not in self.ended_at]

    def size(self, number: int) -> int:
        return self.prompts[number] + self.written[number]

    def held_bytes(self) -> int:
        alone = [{number} for number in self.admitted if number not in self.decoding]
        return sum(len(rows) * bytes_of(max(map(self.size, rows))) for rows in [*alone, *self.groups.values()])

    def padding_bytes(self, rows: set[int]) -> int:
        return len(rows) * bytes_of(max(map(self.size, rows))) - sum(bytes_of(self.size(number)) for number in rows)

    def step(self, max_chunk: int) -> tuple[Places, Chunk | None]:
        self.num_steps += 1
        before = sorted(self.admitted)
        places = self.scheduler.assign()
        assert before[:1] == [number for number in before[:1] if number not in places.sent_back]
        for number in places.sent_back:
            self.num_sent_back += 1
            self.drop(number)
        if places.joined is not None:
            into, other = places.joined
            self.groups[into] |= self.groups.pop(other)
        for number in places.admitted:
            self.admitted.append(number)
            self.computed[number] = 0
        chunk = self.scheduler.next_chunk(max_chunk)
        if chunk is not None:
            self._compute(chunk.number, chunk.num_tokens, max_chunk)
        for number in list(self.decoding):
            self.written[number] += 1
            self.scheduler.note_generated(number, self.size(number))
        assert sorted(number for rows in self.groups.values() for number in rows) == sorted(self.decoding)
        assert all(self.scheduler.group_of(number) == group for group, rows in self.groups.items() for number in rows)
        assert len(self.admitted) <= self.scheduler.max_rows
        assert self.scheduler.num_admitted == len(self.admitted)
        assert self.scheduler.num_waiting == len(self.live) - len(self.admitted)
        if self.scheduler.budget_bytes is not None:
            assert self.held_bytes() <= self.scheduler.budget_bytes
        for number in list(self.decoding):
            if self.written[number] >= self.answers[number]:
                self.end(number)
        return places, chunk

    def _compute(self, number: int, count: int, max_chunk: int) -> None:
        assert number in self.admitted
        assert number not in self.decoding
        assert 1 <= count <= max_chunk
        self.computed[number] += count
        assert self.computed[number] <= self.size(number)
        self.scheduler.note_computed(number, count)
        if self.computed[number] == self.size(number):
            self.decoding.append(number)
            group = self.scheduler.group_of(number)
            assert group is not None
            rows = self.groups.setdefault(group, set())
            rows.add(number)
            limit = self.scheduler.padding_bytes
            assert limit is None or len(rows) == 1 or self.padding_bytes(rows) <= limit

    def run(self, max_chunk: int = 64, limit: int = 20_000) -> None:
        for _ in range(limit):
            if not self.live:
                return
            self.step(max_chunk)
        raise AssertionError(f"requests {self.live} do not end")


REQUESTS = st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300), st.integers(0, 30)), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    max_rows=st.integers(1, 5),
    budget_rows=st.integers(0, 3),
    chunks=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    cancelled=st.sets(st.integers(0, 13), max_size=4),
    padding_bytes=st.none() | st.integers(0, 10_000),
)
def test_every_request_ends_within_the_budgets(
    requests: list[tuple[int, int, int]],
    max_rows: int,
    budget_rows: int,
    chunks: list[int],
    cancelled: set[int],
    padding_bytes: int | None,
) -> None:
    largest = max(prompt + answer for prompt, answer, _ in requests)
    budget = None if budget_rows == 0 else bytes_of(largest) * budget_rows
    world = World(max_rows=max_rows, budget_bytes=budget, padding_bytes=padding_bytes)
    for prompt, answer, pause in requests:
        assert world.scheduler.fits_alone(prompt + answer)
        number = world.add(prompt, answer)
        for i in range(pause):
            world.step(chunks[i % len(chunks)])
        if number in cancelled and number in world.live:
            world.end(number)
    world.run(max(max(chunks), 1))
    assert world.held_bytes() == world.scheduler.held_bytes == 0
    assert all(world.written[number] == world.answers[number] for number in world.prompts if number not in cancelled)


def test_a_request_that_can_never_run_is_known_at_the_start() -> None:
    scheduler = Scheduler(max_rows=2, budget_bytes=bytes_of(1000), bytes_of=bytes_of)
    assert scheduler.fits_alone(1000)
    assert not scheduler.fits_alone(1025)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    world = World()
    long = world.add(30_000, 1)
    world.step(256)
    short = world.add(100, 1)
    world.step(256)
    world.step(256)
    assert world.ended_at == {short: 3}
    assert long in world.live


def test_a_long_prompt_gets_half_of_the_work_however_many_short_ones_come() -> None:
    world = World()
    world.add(10_000, 1)
    given_to_long = total = 0
    while 0 in world.live:
        if len(world.live) < 3:
            world.add(100, 1)
        _, chunk = world.step(256)
        if chunk is not None:
            total += chunk.num_tokens
            given_to_long += chunk.num_tokens if chunk.number == 0 else 0
    assert total > given_to_long
    assert given_to_long >= total * 0.5
    # First come first served would give it everything, shortest first almost nothing.
    assert given_to_long <= total * 0.6


def test_when_memory_runs_short_the_youngest_goes_back_and_ends_later() -> None:
    world = World(max_rows=3, budget_bytes=3 * bytes_of(600) - 1)
    for _ in range(3):
        world.add(200, 700)
    world.run()
    assert world.num_sent_back > 0
    assert sorted(world.ended_at, key=world.ended_at.__getitem__) == [0, 1, 2]
    roomy = World(max_rows=3, budget_bytes=3 * bytes_of(1300))
    for _ in range(3):
        roomy.add(200, 700)
    roomy.run()
    assert roomy.num_sent_back == 0
    assert roomy.num_steps < world.num_steps


def test_a_large_request_is_overtaken_only_a_few_times() -> None:
    world = World(max_rows=4, budget_bytes=4 * bytes_of(1000))
    world.add(200, 100)
    large = world.add(3600, 1)
    order: list[int] = []
    while large not in order:
        if len(world.live) < 6:
            world.add(50, 40)
        order += world.step(64)[0].admitted
    assert 1 <= len([number for number in order if number > large]) <= MAX_OVERTAKEN + 2


def test_rows_are_admitted_only_with_room_to_grow() -> None:
    world = World(max_rows=4, budget_bytes=2 * bytes_of(500 + HEADROOM_TOKENS))
    for _ in range(3):
        world.add(500, 1)
    assert world.step(0)[0].admitted == (0, 1)


def test_a_chunk_is_no_larger_than_asked() -> None:
    world = World()
    world.add(100, 1)
    assert world.step(0)[1] is None
    assert world.step(7)[1] == Chunk(number=0, num_tokens=7)


def test_what_was_found_in_a_cache_is_not_computed() -> None:
    world = World()
    world.add(100, 1)
    world.step(0)
    world.scheduler.note_reused(0, 90)
    world.computed[0] = 90
    assert world.step(64)[1] == Chunk(number=0, num_tokens=10)


def test_short_rows_are_not_padded_to_a_long_one() -> None:
    world = World(padding_bytes=bytes_of(1000))
    for prompt in (3000, 100, 200, 300):
        world.add(prompt, 10)
    while len(world.decoding) < 4:
        world.step(4000)
    assert list(world.groups.values()) == [{0}, {1, 2, 3}]
    assert world.held_bytes() == world.scheduler.held_bytes == bytes_of(3010) + 3 * bytes_of(312)


def test_groups_that_fit_together_become_one() -> None:
    world = World(padding_bytes=29_000)
    for prompt, answer in ((100, 50), (100, 50), (100, 300), (1200, 300)):
        world.add(prompt, answer)
    while len(world.decoding) < 4:
        world.step(4000)
    assert list(world.groups.values()) == [{0, 1, 2}, {3}]
    while len(world.live) > 2:
        assert len(world.groups) == 2
        world.step(4000)
    assert world.step(4000)[0].joined is not None
    assert list(world.groups.values()) == [{2, 3}]
