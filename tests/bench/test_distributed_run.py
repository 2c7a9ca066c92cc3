"""Two ranks, measured: what they send, and the questions that are asked of a model on one rank or several."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from launching import PATIENCE_S, launched, outputs

from lfm_mlx.bench.__main__ import group
from lfm_mlx.bench.decode_speed import ask_decode_speed
from lfm_mlx.bench.shapes import config_named
from lfm_mlx.bench.subject import Subject
from lfm_mlx.distributed.wire import layers_traffic


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system does not count bytes by connection")
def test_ranks_send_what_the_plan_says(tmp_path: Path) -> None:
    asked = ["-m", "lfm_mlx.bench", "distributed", "--shapes", "tiny-moe", "--expert-parallel", "2"]
    with launched(tmp_path, *asked, "--prompt-tokens", "24", "--rows", "2", "--steps", "3") as ranks:
        (code, out, err), (other_code, other_out, other_err) = outputs(ranks)
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    results = json.loads(out)["results"]
    phases = results["phases"]
    assert results["by_rank"][0]["process_bytes"] == pytest.approx(results["rank 0"]["process_bytes"], rel=0.1)
    assert [one["process_bytes"] > one["peak_bytes"] > 0 for one in results["by_rank"]] == [True, True]
    assert [phase["phase"] for phase in phases] == ["prompts", "decode"]
    for phase in phases:
        assert phase["planned_bytes"] > 0
        assert phase["sent_bytes"] == pytest.approx(phase["planned_bytes"], rel=0.02)


def asked(folder: Path, *arguments: str) -> dict[str, Any]:
    """What rank 0 found when two ranks were asked; the other one says nothing."""
    with launched(folder, "-m", "lfm_mlx.bench", *arguments, "--shapes", "tiny-moe") as ranks:
        (code, out, err), (other_code, other_out, other_err) = outputs(ranks)
    assert (code, other_code, other_out, other_err) == (0, 0, "", ""), err + other_err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_decode_step_of_two_ranks_reads_the_part_of_one(tmp_path: Path) -> None:
    case = ["--contexts", "4", "--batch-sizes", "2", "--repeats", "1", "--tokens", "2"]
    found = asked(tmp_path, "decode", *case, "--expert-parallel", "2")
    assert (found["parameters"]["ranks"], found["parameters"]["mode"]) == (2, "expert")
    whole = ask_decode_speed(Subject(shapes="tiny-moe"), contexts=[4], batch_sizes=[2], repeats=1, num_tokens=2)
    (part,), (all_of_it,) = found["results"]["cases"], whole.results["cases"]
    assert part["tokens_per_s"]["lfm_mlx"] > 0
    assert 0.5 < part["step_bytes"] / all_of_it["step_bytes"] < 0.56  # Routers and norms are whole on both.


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX's CPU backend compiles with g++")
def test_collectives_in_a_counted_step_are_those_of_the_plan(tmp_path: Path) -> None:
    found = asked(tmp_path, "kernels", "--contexts", "4", "--batch-sizes", "1", "--tensor-parallel", "2")
    config = config_named("tiny-moe")
    planned = layers_traffic(config, 2, num_tokens=1, num_last=1, item_bytes=2).num_collectives + 1  # The logits' one.
    assert found["results"]["sides"]["lfm_mlx"]["by_kind"]["collective"] == planned == 10


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--peer", "mlx-lm", "--tensor-parallel", "2"], "error: peer is mlx-lm, which does not share this model"),
        ([], "error: 2 processes were launched, each of which would do all of it, expected one of --tensor-parallel, "),
    ],
)
def test_what_ranks_cannot_do_is_refused_by_rank_0_first(options: list[str], told: str, tmp_path: Path) -> None:
    with launched(tmp_path, "-m", "lfm_mlx.bench", "prefill", *options) as ranks:
        out, err = ranks[0].communicate(timeout=PATIENCE_S)
        assert (ranks[0].returncode, ranks[1].poll(), out) == (1, None, "")
    assert err.startswith(told)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--plan", "--steps", "3", "--rows", "2"], "--rows, --steps belong to a measurement"),
        (["--tensor-parallel", "2", "--context", "9"], "--context belong to --plan"),
        ([], "give one of --plan, --tensor-parallel N and --expert-parallel N"),
    ],
)
def test_options_of_the_other_half_are_refused_by_name(options: list[str], told: str) -> None:
    with pytest.raises(click.UsageError, match=told):
        group.main(["distributed", *options], standalone_mode=False)
