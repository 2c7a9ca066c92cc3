"""Memory on a tiny model: what is known exactly is found exactly."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.memory_use import ask_memory
from lfm_mlx.bench.subject import Subject


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
    assert list(phases) == ["before", "load", "prefill", "decode"]
    assert phases["load"]["active_bytes"] - phases["before"]["active_bytes"] >= report.results["found"]["weights"]
    assert phases["prefill"]["peak_bytes"] > phases["load"]["active_bytes"]
    assert all(phase["peak_bytes"] >= phase["active_bytes"] for phase in phases.values())
    assert phases["before"]["process_bytes"] > 1_000_000
