"""The budget of kernel launches, at the full size of LFM2.5-8B-A1B."""

from __future__ import annotations

import shutil
from typing import Any

import mlx.core as mx
import pytest

from lfm_mlx.bench.launch_count import CONTEXTS, ask_launches, count_step, count_step_copies
from lfm_mlx.bench.peer import Peer
from lfm_mlx.bench.sides import GREEDY, Ours
from lfm_mlx.bench.subject import Subject, uneven_lengths
from lfm_mlx.errors import OptionError
from lfm_mlx.model import ShortConv
from lfm_mlx.types import SamplingParams

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="mx.compile needs g++ on the CPU, and there is none on the PATH"
)

MOST_LAUNCHES = 265
MOST_LAUNCHES_16_ROWS = 300
MOST_STOCK_LAUNCHES = 370
MOST_STOCK_LAUNCHES_16_ROWS = 400
CARD = SamplingParams(temperature=0.2, top_k=80, repetition_penalty=1.05)


def launches(side: Ours | Peer, lengths: list[int]) -> int:
    """Launches of a decode step, with those of copies that kernels make."""
    return count_step(side, lengths).total + count_step_copies(side, lengths)


def test_a_token_stays_within_the_budget_and_costs_the_same_at_every_context(ours: Ours) -> None:
    counts = {launches(ours, [context]) for context in CONTEXTS}
    assert len(counts) == 1
    assert max(counts) <= MOST_LAUNCHES


def test_sixteen_rows_of_unequal_length_stay_within_the_budget(ours: Ours) -> None:
    lengths = uneven_lengths(16, 1024)
    assert len(set(lengths)) == 16
    assert launches(ours, lengths) <= MOST_LAUNCHES_16_ROWS


def without_kernels(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> Ours:
    """The same model with stock operations only."""
    monkeypatch.setenv("LFM_MLX_KERNELS", "off")
    return Ours(ours.model, is_compiled=True)


def test_stock_operations_stay_within_a_budget_of_their_own(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = without_kernels(ours, monkeypatch)
    assert MOST_LAUNCHES < launches(stock, [1024]) <= MOST_STOCK_LAUNCHES
    assert MOST_LAUNCHES_16_ROWS < launches(stock, uneven_lengths(16, 1024)) <= MOST_STOCK_LAUNCHES_16_ROWS


@pytest.mark.parametrize(
    ("names", "saved"), [("add_norm", 26), ("combine_norm", 22), ("expert_router", 44), ("qk_norm_rope", 12)]
)
def test_each_fused_kernel_saves_the_launches_that_it_replaces(
    ours: Ours, monkeypatch: pytest.MonkeyPatch, names: str, saved: int
) -> None:
    stock = count_step(without_kernels(ours, monkeypatch), [1024]).total
    monkeypatch.setenv("LFM_MLX_KERNELS", names)
    found = count_step(Ours(ours.model, is_compiled=True), [1024])
    assert stock - found.total == saved
    assert found.by_kind["fused kernel"] > 0


def test_mlx_lm_counted_in_the_same_way_launches_far_more(ours: Ours, peer: Peer) -> None:
    assert launches(peer, [1024]) > 600
    assert launches(peer, [1024]) > 2.5 * launches(ours, [1024])


def test_an_uncompiled_step_breaks_the_budget(ours: Ours) -> None:
    assert count_step(Ours(ours.model, is_compiled=False), [1024]).total > MOST_LAUNCHES


def test_an_operation_planted_in_a_layer_is_counted(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    before = count_step(ours, [1024]).total
    step = ShortConv.step

    def planted(self: ShortConv, x: mx.array, *rest: Any) -> Any:
        return step(self, mx.sort(x, axis=-1), *rest)

    monkeypatch.setattr(ShortConv, "step", planted)
    num_convolutions = ours.config.layer_types.count("conv")
    assert count_step(Ours(ours.model, is_compiled=True), [1024]).total == before + num_convolutions


def test_every_launch_has_a_layer_and_equal_layers_launch_equally_many(ours: Ours) -> None:
    found = count_step(ours, [1024], has_layers=True)
    assert sum(found.by_layer.values()) == sum(found.by_kind.values()) == found.total
    alike = [3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20, 22, 23]
    assert len({found.by_layer[layer] for layer in alike}) == 1
    assert len({found.by_layer[layer] for layer in ours.config.attention_layers}) == 1
    assert found.by_layer[24] == 2  # final norm and head


def test_sampling_adds_few_launches_to_the_last_segment(ours: Ours) -> None:
    alone = count_step(ours, [1024]).total
    assert count_step(ours, [1024], GREEDY).total == alone + 1
    assert alone + 1 < count_step(ours, [1024], CARD).total <= alone + 20


def test_rows_times_context_that_the_cpu_treats_differently_are_refused(ours: Ours) -> None:
    with pytest.raises(OptionError, match="16 x 127999"):
        count_step(ours, uneven_lengths(16, 127999))


def test_the_report_holds_every_case_of_both_sides() -> None:
    report = ask_launches(Subject(shapes="tiny-moe", peer=True), contexts=[1, 300], batch_sizes=[1, 2])
    for side in ("lfm_mlx", "mlx-lm"):
        found = report.results["sides"][side]
        assert [(case["batch_size"], case["context"]) for case in found["decode"]] == [
            (1, 1),
            (1, 300),
            (1, 1024),
            (2, 1024),
        ]
        assert set(found["sampling"]) == {"greedy", "card"}
    assert 0 < report.results["ratio"] < 1
