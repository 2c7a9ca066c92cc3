"""Two ranks, measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import launched, outputs


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not count bytes by connection")
def test_ranks_send_what_the_plan_says(tmp_path: Path) -> None:
    asked = ["-m", "lfm_mlx.bench", "distributed", "--shapes", "tiny-moe", "--expert-parallel", "2"]
    with launched(tmp_path, *asked, "--prompt-tokens", "24", "--rows", "2", "--steps", "3") as ranks:
        (code, out, err), (other_code, other_out, other_err) = outputs(ranks)
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    phases = json.loads(out)["results"]["phases"]
    assert [phase["phase"] for phase in phases] == ["prompts", "decode"]
    for phase in phases:
        assert phase["planned_bytes"] > 0
        assert phase["sent_bytes"] == pytest.approx(phase["planned_bytes"], rel=0.02)
