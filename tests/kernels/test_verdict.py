"""Trials of fused kernels at their first use: what is wrong or slow is left out, told once, and remembered."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from lfm_mlx.kernels import ADD_NORM, MetalKernel, Verdict
from lfm_mlx.kernels.choice import Case, FusedKernel
from lfm_mlx.kernels.verdict import disagreement, environment, try_out, verdict_of, verdict_path

pytestmark = pytest.mark.usefixtures("metal")

verdict = importlib.import_module("lfm_mlx.kernels.verdict")

CASE = Case.of(mx.float32, D=32)
SOURCE_OF_ADD_NORM: MetalKernel = importlib.import_module("lfm_mlx.kernels.add_norm").KERNEL


def timed(monkeypatch: pytest.MonkeyPatch, kernel_us: float, reference_us: float) -> None:
    """Let the clock say this, whatever the machine is busy with."""
    times = {ADD_NORM.launch: kernel_us, ADD_NORM.reference: reference_us}
    monkeypatch.setattr(verdict, "_time_us", lambda function, arguments: times[function])


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel weigh groups of four values alike."""
    source = SOURCE_OF_ADD_NORM.source.replace("weight[first + i]", "weight[first]")
    monkeypatch.setattr(SOURCE_OF_ADD_NORM, "source", source)


def in_new_process() -> None:
    """Forget what this process knows; the file stays."""
    verdict_of.cache_clear()


def test_a_right_and_fast_kernel_runs_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 10.0, 20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = verdict_of(ADD_NORM, CASE, False)
    assert found == Verdict(problem=None, kernel_us=10.0, reference_us=20.0)
    assert found.permits(is_forced=False)


def test_a_slower_kernel_is_left_out_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 30.0, 20.0)
    with pytest.warns(RuntimeWarning, match=r"add_norm \(float32 D=32\) is left out on .*: it takes 30.0 us.*report"):
        found = verdict_of(ADD_NORM, CASE, False)
    assert not found.permits(is_forced=False)
    assert found.permits(is_forced=True)


@pytest.mark.skipif(mx.metal.is_available(), reason="only the emulator is sure to be slower")
def test_the_clock_finds_that_emulation_is_slower() -> None:
    found = try_out(ADD_NORM, CASE)
    assert found.problem is None
    assert found.kernel_us > found.reference_us > 0


@pytest.mark.parametrize("is_forced", [True, False])
def test_a_wrong_kernel_is_left_out_even_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, is_forced: bool) -> None:
    broken(monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"left out on .*: 1 x 1 tokens: result 1 is off by"):
        found = verdict_of(ADD_NORM, CASE, is_forced)
    assert not found.permits(is_forced=is_forced)


def test_a_kernel_that_metal_refuses_is_left_out() -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    failing = dataclasses.replace(ADD_NORM, launch=fail)
    with pytest.warns(RuntimeWarning, match="it fails: .*Unable to build metal library"):
        assert not verdict_of(failing, CASE, True).permits(is_forced=True)


def test_a_verdict_is_remembered_for_the_next_process_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    with pytest.warns(RuntimeWarning, match="off by") as told:
        first = verdict_of(ADD_NORM, CASE, False)
    assert len(told) == 1
    in_new_process()
    monkeypatch.setattr(verdict, "try_out", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdict_of(ADD_NORM, CASE, False) == first
    assert list(json.loads(verdict_path().read_text())) == [environment()]


@pytest.mark.parametrize("change", ["source", "environment", "case"])
def test_a_verdict_holds_for_one_source_one_environment_and_one_case(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    timed(monkeypatch, 10.0, 20.0)
    verdict_of(ADD_NORM, CASE, False)
    in_new_process()
    kernel: FusedKernel = ADD_NORM
    case = CASE
    if change == "source":
        kernel = dataclasses.replace(ADD_NORM, source=ADD_NORM.source + " ")
    elif change == "environment":
        monkeypatch.setattr(verdict, "environment", lambda: "Apple M9, macOS 30.0, mlx 1.0.0")
    else:
        case = Case.of(mx.float32, D=36)
    timed(monkeypatch, 11.0, 20.0)
    assert verdict_of(kernel, case, False).kernel_us == 11.0
    in_new_process()
    timed(monkeypatch, 12.0, 20.0)
    assert verdict_of(kernel, case, False).kernel_us == 11.0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"here": {"key": {"speed": 1}}}', '{"here": 3}'])
def test_a_file_that_cannot_be_understood_costs_a_trial(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    timed(monkeypatch, 10.0, 20.0)
    verdict_path().parent.mkdir(parents=True)
    verdict_path().write_text(text)
    assert verdict_of(ADD_NORM, CASE, False).kernel_us == 10.0
    assert environment() in json.loads(verdict_path().read_text())


def test_a_folder_that_cannot_be_written_costs_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timed(monkeypatch, 10.0, 20.0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert verdict_of(ADD_NORM, CASE, False).kernel_us == 10.0


def test_a_trial_leaves_the_random_numbers_of_others_alone() -> None:
    mx.random.seed(5)
    expected = mx.random.normal((3,)).tolist()
    mx.random.seed(5)
    try_out(ADD_NORM, CASE)
    assert mx.random.normal((3,)).tolist() == expected


@pytest.mark.skipif(shutil.which("g++") is None and not mx.metal.is_available(), reason="mx.compile needs g++")
def test_a_trial_works_while_a_step_is_traced() -> None:
    found = []

    def step(x: mx.array) -> mx.array:
        found.append(try_out(ADD_NORM, CASE))
        return mx.abs(x) + 1

    assert mx.compile(step)(mx.array([-1.0])).tolist() == [2.0]
    assert found[0].problem is None


@pytest.mark.parametrize(
    ("found", "expected", "problem"),
    [
        (mx.array([1.0, 2.0]), mx.array([1.0, 2.000001]), None),
        (mx.array([1.0, 2.0]), mx.array([1.0, 2.001]), "off by"),
        (mx.array([1.0, float("nan")]), mx.array([1.0, 2.0]), "off by nan"),
        (mx.array([1.0, 2.0]).astype(mx.bfloat16), mx.array([1.0, 2.01]).astype(mx.bfloat16), None),
        (mx.array([1.0, 2.0]).astype(mx.bfloat16), mx.array([1.0, 2.2]).astype(mx.bfloat16), "off by"),
        (mx.array([1.0]), mx.array([1.0, 2.0]), "expected"),
        (mx.array([1.0]).astype(mx.float16), mx.array([1.0]), "expected"),
        (mx.array([3], dtype=mx.uint32), mx.array([3], dtype=mx.uint32), None),
        (mx.array([3], dtype=mx.uint32), mx.array([4], dtype=mx.uint32), "result 0 differs"),
    ],
)
def test_results_agree_within_rounding(found: mx.array, expected: mx.array, problem: str | None) -> None:
    said = disagreement([found], [expected])
    assert said is None if problem is None else said is not None and problem in said
