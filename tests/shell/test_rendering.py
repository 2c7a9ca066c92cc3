from __future__ import annotations

import io

import pytest
from rich.console import Console

from lfm_mlx.chat import ChatEvent, Reply, ToolResult, TurnDone, Usage
from lfm_mlx.shell import Rendering, has_styles, is_dumb, make_console
from lfm_mlx.types import CallError, ContentDelta, ReasoningDelta, ToolCall, ToolCallDone, ToolCallFailed

CALL = ToolCall(id="call_1", name="look", arguments={"at": "Größe", "deep": True})
ERROR = CallError(code="unknown_function", message="there is no such function", text="hide()", name="hide")


def written(*events: ChatEvent, is_folded: bool = False) -> str:
    """What a terminal without styles gets."""
    console = Console(file=io.StringIO(), color_system=None, width=20)
    rendering = Rendering(console, console, count_tokens=len)
    rendering.is_folded = is_folded
    for event in events:
        rendering.show(event)
    rendering.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_events_become_lines_in_their_order() -> None:
    text = written(
        ReasoningDelta(text="Let me "),
        ReasoningDelta(text="look.\n"),
        ToolCallDone(call=CALL),
        ToolCallFailed(error=ERROR),
        ToolResult(call=CALL, content="x" * 500),
        ContentDelta(text="[b]It is :smile: "),
        ContentDelta(text="and longer than the terminal is wide\n\tq"),
    )
    assert text.splitlines() == [
        "thinking: Let me look.",
        '-> look(at="Größe", deep=true)',
        "-> not run: hide: there is no such function",
        f"<- {'x' * 400} ... (500 characters)",
        "[b]It is :smile: and longer than the terminal is wide",
        "\tq",
    ]
    assert text.endswith("\tq\n")


def test_folded_reasoning_is_one_line() -> None:
    text = written(ReasoningDelta(text="a\nb\n"), ContentDelta(text="c"), is_folded=True)
    assert text == "thinking ... thought for 0 s, 4 tokens\nc\n"


def test_what_a_model_or_tool_writes_does_not_steer_the_terminal() -> None:
    text = written(
        ContentDelta(text="a\x1b[2Jb\x07\r\x9bc"),
        ReasoningDelta(text="\x1b]52;c;AAAA\x07"),
        ToolResult(call=CALL, content="\x1b[31mred"),
    )
    assert text == "a[2Jbc\nthinking: ]52;c;AAAA\n<- [31mred\n"


@pytest.mark.parametrize(
    ("end", "said"),
    [("stop", ""), ("cancelled", "[stopped]\n"), ("length", "[cut: max_tokens or the context is used up]\n")],
)
def test_an_answer_that_did_not_end_by_itself_says_so(end: str, said: str) -> None:
    reply = Reply(content="", reasoning=None, tool_calls=(), errors=(), usage=Usage(), finish_reason=end)  # type: ignore[arg-type]
    assert written(TurnDone(reply=reply)) == said


@pytest.mark.parametrize(
    ("variables", "no_color", "expected"),
    [
        ({"TERM": "xterm"}, False, True),
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, False, True),
        ({"TERM": "dumb"}, False, False),
        ({}, False, False),
    ],
)
def test_styles_need_a_terminal_that_can_and_a_user_who_wants(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], no_color: bool, expected: bool
) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_styles(no_color=no_color) is expected
    assert is_dumb() is (variables.get("TERM") != "xterm")
    assert make_console(is_styled=False).color_system is None
