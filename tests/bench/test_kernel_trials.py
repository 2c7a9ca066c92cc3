"""The table of trials of fused kernels: all sizes are in it, and what is wrong or slow is told."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner
from metal.drop_in import use_metal

from lfm_mlx.bench import kernel_trials
from lfm_mlx.bench.__main__ import group
from lfm_mlx.bench.kernel_trials import ask_kernel_trials
from lfm_mlx.kernels import ADD_NORM, KERNEL_NAMES, ROUTER, Case
from lfm_mlx.kernels.verdict import verdict_of


def test_every_kernel_is_tried_in_every_size_and_dtype_of_the_family() -> None:
    cases = {(kernel.name, str(case)) for kernel, case in kernel_trials.family_cases()}
    assert {name for name, _ in cases} == set(KERNEL_NAMES)
    for dtype in ("bfloat16", "float16", "float32"):
        assert ("add_norm", f"{dtype} D=1536") in cases
        assert ("qk_norm_rope", f"{dtype} H=24 G=8 P=64") in cases
        assert ("expert_router", f"{dtype} E=64 A=4 normalized=True") in cases
        assert ("combine_norm", f"{dtype} D=2048 A=4 weighed=True normalized=False") in cases


def test_trials_are_made_again_and_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_metal(monkeypatch, tmp_path, orders=[0])
    cases = [(ADD_NORM, Case.of(mx.float32, D=64)), (ROUTER, Case.of(mx.bfloat16, E=8, A=2, normalized=True))]
    monkeypatch.setattr(kernel_trials, "family_cases", lambda: iter(cases))
    trials = ask_kernel_trials().results["trials"]
    assert [trial["kernel"] for trial in trials] == ["add_norm", "expert_router"]
    for (kernel, case), trial in zip(cases, trials, strict=True):
        assert trial["agrees"]
        assert trial["problem"] is None
        found = verdict_of(kernel, case, False)
        assert (round(found.kernel_us, 2), round(found.reference_us, 2)) == (trial["kernel_us"], trial["stock_us"])
        assert trial["runs"] == found.permits(is_forced=False)


@pytest.mark.skipif(mx.metal.is_available(), reason="takes a minute where there is Metal")
def test_without_metal_the_table_says_that_nothing_was_tried() -> None:
    done = CliRunner().invoke(group, ["kernels", "--verify"])
    assert done.exit_code == 0
    assert "Nothing was tried" in done.stderr
    trials = json.loads(done.stdout)["results"]["trials"]
    assert len(trials) == len(list(kernel_trials.family_cases()))
    assert {trial["agrees"] for trial in trials} == {None}


def test_other_options_beside_verify_are_refused() -> None:
    done = CliRunner().invoke(group, ["kernels", "--verify", "--bits", "8"])
    assert done.exit_code == 2
    assert "--verify takes no other options, found --bits" in done.stderr
