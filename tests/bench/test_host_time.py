"""Host time is measured, not promised here; that nothing is traced again is."""

from __future__ import annotations

import gc
import shutil

import mlx.core as mx
import pytest

from lfm_mlx.bench.host_time import CountingStepper, ask_host_time, count_traces
from lfm_mlx.bench.launches import stand_ins
from lfm_mlx.bench.sides import Ours
from lfm_mlx.bench.subject import Subject

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="mx.compile needs g++ on the CPU, and there is none on the PATH"
)


def test_nothing_is_traced_again_while_the_context_grows_to_32k(ours: Ours) -> None:
    traces = count_traces(ours.model, 32768)
    assert traces["first_step"] == len(ours.config.attention_layers) + 1
    assert traces["later"] == 0
    assert traces["steps"] > 250


def test_traces_for_another_number_of_rows_are_counted(ours: Ours) -> None:
    counted = Ours(ours.model, is_compiled=True)
    counted.stepper = stepper = CountingStepper(ours.model)
    with stand_ins():
        for batch_size in (1, 2, 2):
            tokens = mx.zeros((batch_size,), dtype=mx.int32)
            counted.logits(counted.new_rows([5] * batch_size, capacity=6, is_view=True), tokens)
    assert stepper.num_traces == 2 * (len(ours.config.attention_layers) + 1)


def test_both_sides_are_timed_and_garbage_collection_is_back_on() -> None:
    report = ask_host_time(Subject(shapes="tiny-dense", peer=True), batch_sizes=[1, 2], repeats=2, grown_to=256)
    assert [case["batch_size"] for case in report.results["steps"]] == [1, 2]
    for case in report.results["steps"]:
        assert min(case["ms"]["lfm_mlx"], case["ms"]["mlx-lm"]) > 0
        assert case["ratio"] == round(case["ratio"], 4)
    assert gc.isenabled()
