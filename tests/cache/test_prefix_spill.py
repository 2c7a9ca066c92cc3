"""The prefix cache with a disk: what was written is found again, and what is damaged is never used."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from random_models import tiny_config, tiny_model

from lfm_mlx.cache import DiskStore, PrefixCache
from lfm_mlx.errors import OptionError
from lfm_mlx.step import stepper_of

BLOCK = 16
MODEL = tiny_model(tiny_config(head_dim=32))
KV_BITS = pytest.mark.parametrize("kv_bits", [None, 8, 4])
WAIT_S = 120.0


class Disk:
    """Opens caches on one folder, one after the other, and closes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache: PrefixCache | None = None

    def open(
        self,
        *,
        fingerprint: str = "one",
        dtype: mx.Dtype = mx.float32,
        kv_bits: int | None = None,
        block_tokens: int = BLOCK,
        max_bytes: int = 1 << 30,
        disk_bytes: int = 1 << 30,
    ) -> PrefixCache:
        self.close()
        self.store = DiskStore(self.folder, max_bytes=disk_bytes, fingerprint=fingerprint)
        self.cache = PrefixCache(
            MODEL.config, dtype=dtype, kv_bits=kv_bits, max_bytes=max_bytes, block_tokens=block_tokens, disk=self.store
        )
        return self.cache

    def settle(self) -> None:
        """Have all files written and counted."""
        assert self.cache is not None
        for _ in range(2):
            self.cache.settle()
            assert self.store.wait(WAIT_S)

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close(WAIT_S)
            self.cache = None

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*/*.safetensors"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "prefixes")
    yield disk
    disk.close()


def drawn(num_tokens: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(8, 97, num_tokens)]


def run(cache: PrefixCache, ids: list[int]) -> tuple[int, Any]:
    """Compute a prompt with the cache's help and keep it there: tokens reused, and logits (V,)."""
    state = MODEL.new_state(kv_bits=cache.kv_bits)
    num_reused = cache.restore(ids, state)
    state.ask(cache.places(ids, num_reused))
    logits = stepper_of(MODEL).prefill(state, mx.array([ids[num_reused:]]))
    cache.insert(ids, state, 0, state.take_checkpoints())
    return num_reused, np.array(logits[0])


def is_cold(logits: Any, ids: list[int], kv_bits: int | None = None) -> bool:
    """Whether logits are those of a run without a cache, to 1e-5 of the largest one."""
    expected = np.array(stepper_of(MODEL).prefill(MODEL.new_state(kv_bits=kv_bits), mx.array([ids]))[0])
    return bool(np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max())


IDS = drawn(70)


@KV_BITS
def test_a_restarted_cache_goes_on_where_the_last_one_stopped(disk: Disk, kv_bits: int | None) -> None:
    run(disk.open(kv_bits=kv_bits), IDS)
    cache = disk.open(kv_bits=kv_bits)
    assert (cache.num_bytes, cache.num_blocks) == (0, 0)
    assert cache.find([*IDS, 9]) == 69
    reused, logits = run(cache, [*IDS, 9])
    assert reused == 69
    assert is_cold(logits, [*IDS, 9], kv_bits)
    assert not is_cold(logits, [*IDS, 10], kv_bits)
    assert cache.num_bytes > 0


def test_bfloat16_blocks_come_back_bit_for_bit(disk: Disk) -> None:
    model = tiny_model(tiny_config(), dtype=mx.bfloat16, stored=None)
    state = model.new_state()
    for layer in state.attentions:
        layer.arrays = tuple(mx.random.normal((1, 2, 48, 8)).astype(mx.bfloat16) for _ in layer.arrays)
    state.lengths = (33,)
    rows = mx.random.normal((2, 2, 32)).astype(mx.bfloat16)

    def opened() -> PrefixCache:
        store = DiskStore(disk.folder, max_bytes=1 << 30, fingerprint="one")
        return PrefixCache(model.config, dtype=mx.bfloat16, max_bytes=1 << 30, block_tokens=BLOCK, disk=store)

    cache = opened()
    cache.insert(drawn(33), state, 0, {33: rows})
    cache.close(WAIT_S)
    cache, restored = opened(), model.new_state()
    assert cache.restore(drawn(34), restored) == 33
    cache.close(WAIT_S)
    for found, expected in zip(restored.attentions, state.attentions, strict=True):
        assert all(
            mx.array_equal(a[:, :, :33], b[:, :, :33]) for a, b in zip(found.arrays, expected.arrays, strict=True)
        )
    assert mx.array_equal(restored.checkpoint(), rows)


def test_blocks_that_left_memory_come_back_from_disk(disk: Disk) -> None:
    whole = disk.open()
    run(whole, IDS)
    cache = disk.open(fingerprint="other", max_bytes=whole.num_bytes * 3 // 2)
    for seed in range(5):
        run(cache, drawn(70, seed))
        disk.settle()
    assert cache.num_bytes <= cache.max_bytes
    for seed in range(5):
        reused, logits = run(cache, [*drawn(70, seed), 9])
        assert reused == 69
        assert is_cold(logits, [*drawn(70, seed), 9])
        assert cache.num_bytes <= cache.max_bytes


def test_blocks_that_wait_for_the_disk_are_counted_and_taken_back(disk: Disk) -> None:
    cache = disk.open(max_bytes=1 << 30)
    run(cache, IDS)
    cache.settle()
    cache.shrink(0)
    assert cache.num_blocks == 0
    assert cache.find([*IDS, 9]) == 69
    assert is_cold(run(cache, [*IDS, 9])[1], [*IDS, 9])


def test_parting_and_growing_blocks_are_found_again_whole(disk: Disk) -> None:
    cache = disk.open()
    prompts = [IDS[:20], IDS[:27], IDS, [*IDS[:37], *drawn(40, 1)], [*IDS[:35], *drawn(9, 2)], [*IDS[:36], 9, 9]]
    for ids in prompts:
        run(cache, ids)
        disk.settle()
    nodes = {(node.start, node.tokens, frozenset(node.value.lengths)) for node in cache._tree}
    assert len(disk.files) == len(nodes)
    again = disk.open()
    assert {(node.start, node.tokens, frozenset(node.value.lengths)) for node in again._tree} == nodes
    for ids in prompts:
        reused, logits = run(again, [*ids, 9])
        assert reused == len(ids) - 1
        assert is_cold(logits, [*ids, 9])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_a_token(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 1
    path.write_bytes(content)


def replace_by_other_safetensors(path: Path) -> None:
    mx.save_safetensors(str(path), {"columns.0": mx.zeros((4, 2, 16, 32))})


def replace_by_a_sibling(path: Path) -> None:
    other = next(file for file in path.parent.iterdir() if file != path)
    shutil.copy(other, path)


DAMAGES = [
    cut,
    cut_in_header,
    empty,
    fill_with_garbage,
    flip_last_byte,
    flip_a_token,
    replace_by_other_safetensors,
    replace_by_a_sibling,
]


@pytest.mark.parametrize("is_running", [True, False], ids=["running", "restarted"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_with_one_warning(
    disk: Disk, damage: Callable[[Path], None], is_running: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = disk.open()
    run(cache, IDS)
    disk.settle()
    (key,) = (node.value.key for node in cache._tree if node.start == 32)
    (path,) = (file for file in disk.files if file.stem == key)
    cache.shrink(0)
    if not is_running:
        disk.close()
    damage(path)
    with caplog.at_level(logging.WARNING):
        cache = cache if is_running else disk.open()
        reused, logits = run(cache, [*IDS, 9])
        assert reused == 32
        assert is_cold(logits, [*IDS, 9])
        disk.settle()
    assert len(caplog.records) == 1
    assert "is not used" in caplog.text
    assert disk.open().find([*IDS, 9]) == 70


@pytest.mark.parametrize("seed", range(2))
def test_any_flipped_byte_is_noticed_or_changes_nothing(disk: Disk, seed: int) -> None:
    run(disk.open(), IDS)
    disk.close()
    generator = np.random.default_rng(seed)
    for _ in range(4):
        for path in disk.files:
            content = bytearray(path.read_bytes())
            content[int(generator.integers(len(content) if seed % 2 else 700))] ^= 1 << int(generator.integers(8))
            path.write_bytes(content)
        cache = disk.open()
        assert is_cold(run(cache, [*IDS, 9])[1], [*IDS, 9])
        disk.close()


def test_a_stranger_s_file_is_left_alone_with_a_warning(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    run(disk.open(), IDS)
    disk.close()
    stranger = disk.files[0].parent / "notes.txt"
    stranger.write_text("mine")
    with caplog.at_level(logging.WARNING):
        assert disk.open().find(IDS) == 69
    assert "notes.txt is not used: it is no block" in caplog.text
    assert stranger.read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [{"fingerprint": "two"}, {"dtype": mx.bfloat16}, {"kv_bits": 8}, {"block_tokens": 32}],
    ids=lambda change: next(iter(change)),
)
def test_what_another_model_or_setting_wrote_is_not_used(disk: Disk, change: dict[str, Any]) -> None:
    run(disk.open(), IDS)
    assert disk.open(**change).find(IDS) == 0
    assert disk.store.num_bytes == sum(file.stat().st_size for file in disk.files) > 0
    assert disk.open().find(IDS) == 69


def test_files_stay_within_the_limit_and_those_of_other_models_go_first(disk: Disk) -> None:
    run(disk.open(fingerprint="other"), IDS)
    disk.close()
    size = sum(file.stat().st_size for file in disk.files)
    cache = disk.open(disk_bytes=size * 5 // 2)
    for seed in range(1, 5):
        run(cache, drawn(70, seed))
        disk.settle()
    disk.settle()
    assert disk.store.num_bytes == sum(file.stat().st_size for file in disk.files) <= size * 5 // 2
    again = disk.open()
    found = [again.find([*drawn(70, seed), 9]) for seed in range(5)]
    assert found[:2] == [0, 0]
    assert found[3:] == [69, 69]
    assert disk.open(fingerprint="other").find(IDS) == 0


def test_a_restart_knows_what_was_used_last(disk: Disk) -> None:
    cache = disk.open()
    for seed in range(3):
        run(cache, drawn(70, seed))
        disk.settle()
    cache.restore([*drawn(70, 0), 9], MODEL.new_state())
    disk.close()
    size = sum(file.stat().st_size for file in disk.files)
    cache = disk.open(disk_bytes=size * 2 // 3 + 1000)
    disk.settle()
    assert [cache.find([*drawn(70, seed), 9]) for seed in range(3)] == [69, 0, 69]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a thing of Linux")
def test_a_full_disk_interrupts_writing_with_one_warning_and_loses_nothing(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    run(disk.open(), IDS)
    disk.close()
    for path in disk.files:  # The same blocks again will be written beside these names: where nothing fits.
        path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")
        path.unlink()
    with caplog.at_level(logging.WARNING):
        cache = disk.open()
        run(cache, IDS)
        disk.settle()
        assert not disk.store.is_writing
        run(cache, drawn(70, 1))
        disk.settle()
    assert len(caplog.records) == 1
    assert "No space left on device; prefixes are kept in memory only" in caplog.text
    reused, logits = run(cache, [*IDS, 9])
    assert reused == 69
    assert is_cold(logits, [*IDS, 9])
    cache.shrink(0)
    assert (cache.num_bytes, cache.find([*IDS, 9])) == (0, 0)
    assert all(path.is_symlink() for path in disk.folder.glob("*/*"))


@pytest.mark.parametrize("fails_between_blocks", [False, True])
def test_writing_is_tried_again_now_and_then_until_it_succeeds(
    disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fails_between_blocks: bool
) -> None:
    def write(ids: list[int], *, is_time: bool) -> int:
        if is_time:
            disk.store._next_try_s = 0.0
        run(cache, ids)
        disk.settle()
        return len(disk.files)

    cache = disk.open()
    if fails_between_blocks:
        # The writer has failed at a block before the next one, which was found to be writable, is queued.
        queue = disk.store.write
        monkeypatch.setattr(disk.store, "write", lambda *block: disk.store.wait(WAIT_S) and queue(*block))
    (folder,) = disk.folder.iterdir()
    folder.rmdir()
    folder.touch()  # Nothing can be written into a file.
    with caplog.at_level(logging.WARNING):
        assert write(IDS, is_time=False) == 0
        assert write([*IDS, *drawn(20, 1)], is_time=True) == 0
        folder.unlink()
        assert write([*IDS, *drawn(20, 2)], is_time=False) == 0
        assert len(caplog.records) == 1
        assert write([*IDS, *drawn(20, 3)], is_time=True) > 0
    assert [("tried again" in text, "written again" in text) for text in caplog.messages] == [(1, 0), (0, 1)]
    assert disk.open().find([*IDS, *drawn(20, 3), 9]) == 89


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="file/prefixes cannot be made"):
        DiskStore(tmp_path / "file" / "prefixes", max_bytes=1, fingerprint="one")
    with pytest.raises(OptionError, match="max_bytes is 0, expected at least 1"):
        DiskStore(tmp_path / "prefixes", max_bytes=0, fingerprint="one")


def test_files_deleted_behind_our_back_are_misses_without_a_warning(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    run(disk.open(), IDS)
    cache = disk.open()
    for path in disk.files[::2]:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert is_cold(run(cache, [*IDS, 9])[1], [*IDS, 9])
    assert not caplog.records


def test_clearing_deletes_the_files(disk: Disk) -> None:
    cache = disk.open()
    run(cache, IDS)
    disk.settle()
    assert disk.files
    cache.clear()
    disk.settle()
    assert not disk.files
    assert (disk.store.num_bytes, cache.num_bytes) == (0, 0)


class WithRestarts(RuleBasedStateMachine):
    """Prompts, evictions and restarts in any order: what is reused was there, and counts stay right."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.disk = Disk(Path(self.folder.name))
        self.cache = self.disk.open()
        self.left: set[tuple[int, ...]] = set()

    ids = st.lists(st.integers(1, 2), min_size=1, max_size=3).flatmap(
        lambda head: st.integers(1, 60).map(lambda n: (head * 60)[:n])
    )

    @rule(ids=ids)
    def prompt(self, ids: list[int]) -> None:
        expected = max((n for n in range(1, len(ids)) if tuple(ids[:n]) in self.left), default=0)
        reused, logits = run(self.cache, ids)
        assert reused == expected
        assert not reused or is_cold(logits, ids)
        self.left |= {tuple(ids[:n]) for n in self.cache.places(ids)}

    @rule(kept=st.floats(0, 1))
    def shrink(self, kept: float) -> None:
        self.disk.settle()
        limit = int(self.cache.num_bytes * kept)
        self.cache.shrink(limit)
        assert self.cache.num_bytes <= limit

    @rule()
    def restart(self) -> None:
        self.cache = self.disk.open()

    @invariant()
    def counts_are_right(self) -> None:
        held = [node.value.block.num_bytes for node in self.cache._tree if node.value.block is not None]
        assert (self.cache.num_bytes, self.cache.num_blocks) == (sum(held), len(held))

    def teardown(self) -> None:
        self.disk.settle()
        on_disk = sum(file.stat().st_size for file in self.disk.files)
        assert self.disk.store.num_bytes == on_disk
        self.disk.close()
        self.folder.cleanup()


TestWithRestarts = WithRestarts.TestCase
TestWithRestarts.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
