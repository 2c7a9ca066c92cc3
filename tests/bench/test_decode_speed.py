"""Decode speed on a tiny model: every number is there and the arithmetic between them holds."""

from __future__ import annotations

import pytest

from lfm_mlx.bench.decode_speed import ask_decode_speed
from lfm_mlx.bench.subject import Subject


@pytest.mark.usefixtures("uncompiled")
def test_both_sides_decode_and_the_share_follows_from_speed_and_bytes() -> None:
    subject = Subject(shapes="tiny-moe", peer=True)
    report = ask_decode_speed(subject, contexts=[5, 40], batch_sizes=[1, 2], repeats=1, num_tokens=2)
    assert [(case["batch_size"], case["context"]) for case in report.results["cases"]] == [
        (1, 5),
        (1, 40),
        (2, 5),
        (2, 40),
    ]
    for case in report.results["cases"]:
        speeds = case["tokens_per_s"]
        assert case["ratio"] == pytest.approx(speeds["lfm_mlx"] / speeds["mlx-lm"], rel=1e-3)
        share = speeds["lfm_mlx"] / case["roofline_tokens_per_s"]
        assert case["roofline_share"] == pytest.approx(share, rel=0.02, abs=1e-3)
        assert case["achieved_gb_per_s"] == pytest.approx(
            case["step_bytes"] * speeds["lfm_mlx"] / case["batch_size"] / 1e9, rel=0.02, abs=1e-3
        )
