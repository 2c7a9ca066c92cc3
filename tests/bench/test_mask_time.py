"""Times are measured, not promised here; that a start is a real one, and that the report says so, is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest

from lfm_mlx.bench import __main__ as command_line
from lfm_mlx.bench.mask_time import Case, measure_case, tools_like_a_server, wide_tokenizer
from lfm_mlx.constrain import GrammarTokenizer, ToolCalls, grammar_tokenizer
from lfm_mlx.errors import OptionError

SMALL = ["--tools", "2", "--starts", "2", "--answers", "1"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> GrammarTokenizer:
    return GrammarTokenizer(wide_tokenizer(tmp_path, 2000))


def ask(*arguments: str) -> None:
    command_line.group.main(["constrain", *arguments], prog_name="bench", standalone_mode=False)


def calls(num_tools: int, seed: int) -> Any:
    return partial(ToolCalls, tools_like_a_server(num_tools, seed), tool_choice="required")


def count_compiled(case: Case, vocabulary: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many grammars are compiled where three are started."""
    compiled = []
    real = vocabulary.compile.__globals__["LLMatcher"]  # type: ignore[attr-defined]

    def compile_counted(*arguments: Any, **options: Any) -> Any:
        compiled.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setitem(vocabulary.compile.__globals__, "LLMatcher", compile_counted)  # type: ignore[attr-defined]
    times = measure_case(case, vocabulary, starts=3, answers=1, answer_len=5)
    assert [len(times[phase]) for phase in ("check", "compile", "restart")] == [3, 3, 3]
    return len(compiled)


def test_every_start_compiles_and_no_restart_does(
    vocabulary: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert count_compiled(partial(calls, 3), vocabulary, monkeypatch) == 3


def test_the_same_tools_again_would_not_count_as_a_start(
    vocabulary: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    assert count_compiled(lambda _: calls(3, 0), vocabulary, monkeypatch) == 1


@pytest.mark.parametrize("has_model", [False, True], ids=["made-up", "folder"])
def test_the_last_line_names_every_case(has_model: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide_tokenizer(tmp_path, 1500)
    ask(*(["--model", str(tmp_path)] if has_model else ["--vocab-size", "1500"]), *SMALL)
    printed = capsys.readouterr()
    report = json.loads(printed.out.splitlines()[-1])
    assert report["question"] == "constrain"
    assert report["parameters"]["vocab_size"] == 1500
    assert list(report["results"]["cases"]) == ["2 tools, pythonic", "2 tools, json", "JSON schema", "regex"]
    for name, case in report["results"]["cases"].items():
        assert name in printed.err
        assert case["check"]["count"] == case["compile"]["count"] == case["restart"]["count"] == 2
        for clock in ("thread_ms", "clock_ms"):
            times = case["mask"][clock]
            assert 0 < times["best"] <= times["median"] <= times["p95"] <= times["p99"]


def test_a_folder_and_a_made_up_vocabulary_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(click.UsageError, match="either --model or --vocab-size"):
        ask("--model", str(tmp_path), "--vocab-size", "2000")
    with pytest.raises(OptionError, match="at least 1,000"):
        wide_tokenizer(tmp_path, 10)


def test_masks_of_many_tools_take_a_small_part_of_a_step(tmp_path: Path) -> None:
    vocabulary = grammar_tokenizer(wide_tokenizer(tmp_path, 8000))
    masks = sorted(taken.thread_s for taken in measure_case(partial(calls, 67), vocabulary, 1, 4)["mask"])
    # Loose: a shared machine may stop a thread in the middle. The bench measures in earnest.
    assert masks[len(masks) // 2] < 0.002
    assert len(masks) > 100


def test_tools_that_differ_are_grammars_that_differ() -> None:
    assert tools_like_a_server(3, 0) != tools_like_a_server(3, 1)
    with pytest.raises(OptionError):
        ToolCalls([*tools_like_a_server(1), *tools_like_a_server(1)])
