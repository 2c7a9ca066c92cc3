"""What ends every question: one JSON line, last on standard output, that says what ran."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
import mlx.core as mx
import pytest

from lfm_mlx.bench import __main__ as command_line
from lfm_mlx.bench.report import format_table
from lfm_mlx.errors import OptionError

QUESTIONS = [
    ["kernels", "--shapes", "tiny-dense", "--contexts", "1,9", "--batch-sizes", "2"],
    ["host", "--shapes", "tiny-dense", "--batch-sizes", "1", "--repeats", "1", "--grown-to", "256"],
    ["decode", "--shapes", "tiny-dense", "--contexts", "4", "--batch-sizes", "1", "--repeats", "1", "--tokens", "1"],
    ["prefill", "--shapes", "tiny-moe", "--bits", "8", "--lengths", "4", "--repeats", "1"],
    ["memory", "--shapes", "tiny-moe", "--context", "20"],
]


def ask(arguments: Sequence[str]) -> None:
    command_line.group.main(list(arguments), prog_name="bench", standalone_mode=False)


@pytest.mark.parametrize("arguments", QUESTIONS, ids=lambda arguments: arguments[0])
def test_the_last_line_of_every_question_is_its_report(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ask(arguments)
    printed = capsys.readouterr()
    report: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    assert report["question"] == arguments[0]
    assert report["parameters"]["shapes"] == arguments[2]
    assert report["results"]
    assert set(report["versions"]) == {"python", "mlx", "mlx_lm", "lfm_mlx"}
    assert report["machine"]["memory_bytes"] > 1_000_000_000
    assert report["backend"] == report["machine"]["backend"]
    assert f"[{report['backend']}]" in printed.err


def test_nothing_claims_metal_where_it_did_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    if mx.default_device().type != mx.cpu:
        pytest.skip("this machine computes on a GPU")
    ask(QUESTIONS[0])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["backend"] == "cpu"
    assert "[metal]" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["decode", "--contexts", "1,x"], "no list of whole numbers"),
        (["decode", "--contexts", "0"], "outside 1 to"),
        (["kernels", "--model", "a", "--shapes", "tiny-moe"], "either --model or --shapes"),
        (["memory", "--peer", "mlx-lm"], "leave --peer out"),
        (["host", "--peer", "vllm"], "vllm"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(arguments: list[str], told: str) -> None:
    with pytest.raises((click.ClickException, OptionError), match=told):
        ask(arguments)


def test_columns_stand_below_their_names() -> None:
    assert format_table(["rows", "ms"], [["1", 0.51234], ["16", 12345], ["4", None]]).splitlines() == [
        "  rows      ms",
        "  1      0.512",
        "  16    12,345",
        "  4          -",
    ]
