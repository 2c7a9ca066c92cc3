"""Memory on a tiny model: what is known exactly is found exactly."""

from __future__ import annotations

import mlx.core as mx
import pytest

from lfm_mlx.bench.chunk_memory import fill_with_random
from lfm_mlx.bench.memory_growth import watch_growth
from lfm_mlx.bench.memory_use import ask_memory
from lfm_mlx.bench.shapes import RandomWeights, config_named, made_up_model
from lfm_mlx.bench.subject import Subject
from lfm_mlx.cache import KVCache, QuantizedKVCache
from lfm_mlx.errors import OptionError


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_planner_names_the_bytes_that_are_found(kv_bits: int | None) -> None:
    report = ask_memory(Subject(shapes="tiny-moe", kv_bits=kv_bits), context=300, computed=30)
    found, planned = report.results["found"], report.results["planned"]
    for exact in ("weights", "keys and values", "convolution states"):
        assert found[exact] == planned[exact] > 0
    assert found["total"] <= planned["total"]


def test_phases_are_told_apart() -> None:
    report = ask_memory(Subject(shapes="tiny-dense"), context=30)
    phases = {phase["phase"]: phase for phase in report.results["phases"]}
    assert list(phases) == ["before", "load", "cache", "prefill", "decode"]
    assert phases["load"]["active_bytes"] - phases["before"]["active_bytes"] >= report.results["found"]["weights"]
    assert phases["cache"]["peak_bytes"] > phases["load"]["active_bytes"]
    assert all(phase["peak_bytes"] >= phase["active_bytes"] for phase in phases.values())
    assert phases["before"]["process_bytes"] > 1_000_000


def test_a_chunk_is_computed_in_a_layer_of_each_kind_and_leaves_the_rows_as_long_as_they_were() -> None:
    report = ask_memory(Subject(shapes="tiny-moe", kv_bits=8), context=100, prefill_chunk=64)
    transients = report.results["chunk"]["transient_bytes"]
    kinds = ["convolution, dense", "convolution, experts", "attention, dense", "attention, experts", "head"]
    assert sorted(transients) == sorted(kinds)
    vocabulary = config_named("tiny-moe").vocab_size
    assert transients["head"] == vocabulary * 4
    assert all(needed > 64 * 256 * 4 for kind, needed in transients.items() if kind != "head")
    phase = report.results["phases"][-1]
    assert phase["peak_bytes"] == phase["active_bytes"] + max(transients.values())


def test_a_chunk_longer_than_the_context_is_refused() -> None:
    with pytest.raises(OptionError, match="prefill_chunk is 65, expected at most the context, 64"):
        ask_memory(Subject(shapes="tiny-moe"), context=64, prefill_chunk=65)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_random_keys_and_values_fill_the_columns_asked_for_and_no_others(kv_bits: int | None) -> None:
    model = made_up_model(RandomWeights(config_named("tiny-moe"), 4), mx.float32)
    state = model.new_state(2, kv_bits=kv_bits)
    state.reserve(1200)
    fill_with_random(state, 1100)
    cache = state.layers[1]
    assert isinstance(cache, KVCache | QuantizedKVCache)
    filled = mx.abs(cache.arrays[0]).astype(mx.float32).sum(axis=(1, 3))  # (B, capacity)
    assert mx.all(filled[:, :1100] > 0).item()
    assert not mx.any(filled[:, 1100:]).item()


def test_an_answer_is_watched_to_its_end_and_leaves_nothing_behind_but_its_cache() -> None:
    model = made_up_model(RandomWeights(config_named("tiny-moe"), 4), mx.float32)
    looks = list(watch_growth(model, 90, every=30))
    assert [look["tokens"] for look in looks] == [30, 60, 90]
    assert {look["graph_nodes"] for look in looks} == {0}
    assert len({look["cache_bytes"] for look in looks}) == 1
    assert abs(looks[1]["other_bytes"] - looks[0]["other_bytes"]) < 100
    assert looks[0]["resident_bytes"] > looks[0]["active_bytes"]
