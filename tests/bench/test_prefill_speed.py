"""Prefill speed on a tiny model."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.prefill_speed import ask_prefill_speed
from lfm_mlx.bench.subject import Subject


@pytest.mark.usefixtures("uncompiled")
def test_both_sides_take_prompts_of_every_length_and_number() -> None:
    subject = Subject(shapes="tiny-dense", peer=True)
    report = ask_prefill_speed(subject, lengths=[2, 9], batch_sizes=[1, 2], repeats=1)
    cases = report.results["cases"]
    assert [(case["batch_size"], case["length"]) for case in cases] == [(1, 2), (1, 9), (2, 2), (2, 9)]
    assert all(min(case["tokens_per_s"].values()) > 0 for case in cases)
    assert all(set(case["tokens_per_s"]) == {"lfm_mlx", "mlx-lm"} for case in cases)
