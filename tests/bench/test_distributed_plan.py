"""The paper plan of several machines."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.distributed_plan import WIRES, ask_distributed_plan
from lfm_mlx.bench.subject import Subject
from lfm_mlx.errors import OptionError


def test_the_plan_of_the_real_model_counts_parts_sums_and_bytes() -> None:
    report = ask_distributed_plan(Subject())
    sizes = {(one["mode"], one["ranks"]): one for one in report.results["sizes"]}
    assert sorted(sizes, key=str) == [
        ("expert", 2),
        ("expert", 4),
        ("expert", 8),
        ("tensor", 2),
        ("tensor", 4),
        (None, 1),
    ]
    alone, two = sizes[None, 1], sizes["tensor", 2]
    assert alone["weight_bytes"] / 2 < two["weight_bytes"] < 1.002 * alone["weight_bytes"] / 2
    assert (alone["collectives_per_token"], two["collectives_per_token"]) == (0, 51)
    assert two["sent_bytes_per_token"] == 49 * 4096 + 128_000 + 8
    by_wire = {(speed["wire"], speed["rows"]): speed["tokens_per_s"] for speed in two["speeds"]}
    single = {speed["rows"]: speed["tokens_per_s"] for speed in alone["speeds"]}
    # Latency decides: over TCP a single stream is slower than on one machine, over RDMA it is not.
    assert by_wire["10 GbE", 1] < single[1] < by_wire["RDMA over Thunderbolt 5", 1] < 2 * single[1]
    assert any("so it pays for memory alone" in note for note in report.notes)


def test_dealt_out_experts_are_read_more_often_in_a_step() -> None:
    report = ask_distributed_plan(Subject(shapes="tiny-moe", bits=16), batch_sizes=(1,))
    sizes = {(one["mode"], one["ranks"]): one for one in report.results["sizes"]}
    tensor, expert = sizes["tensor", 4], sizes["expert", 4]
    assert tensor["weight_bytes"] == expert["weight_bytes"]
    assert tensor["sent_bytes_per_token"] == expert["sent_bytes_per_token"]
    for a, b in zip(tensor["speeds"], expert["speeds"], strict=True):
        assert a["prefill_tokens_per_s"] == b["prefill_tokens_per_s"]
        assert a["tokens_per_s"] > b["tokens_per_s"]


def test_latency_counts_a_hop_and_rdma_is_a_mesh() -> None:
    assert WIRES[0].seconds(1, 0, 4) == pytest.approx(6 * 150e-6)
    assert WIRES[-1].seconds(1, 0, 4) == pytest.approx(2 * 10e-6)


def test_an_unknown_chip_is_refused() -> None:
    with pytest.raises(OptionError, match="chip is 'M9', expected one of M1"):
        ask_distributed_plan(Subject(), chip="M9")
