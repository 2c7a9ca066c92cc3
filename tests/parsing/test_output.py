import codecs
import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_call_corpus import LISTS, REFUSED_VALUES, VALUES

from lfm_mlx.errors import OptionError
from lfm_mlx.parsing import OutputStream, ParsedOutput, collect, merged, parse_output, render_calls
from lfm_mlx.parsing.router import Router, Span
from lfm_mlx.tokenizer.special import THINK_END, THINK_START, TOOL_CALL_END, TOOL_CALL_START
from lfm_mlx.types import ContentDelta, OutputEvent, ReasoningDelta, ToolCall, ToolCallDone

S, E = TOOL_CALL_START, TOOL_CALL_END
many = settings(max_examples=100, deadline=None)
few = settings(max_examples=50, deadline=None)

# Every kind of text a router meets, and their borders.
FRAGMENTS = (
    S, E, THINK_START, THINK_END, "[f(a=1)]", "[f(a='it's')]", "[f(a='", "')]", "'", '"', "[f()]", "f(", ")", "\\",
    " ", "\n", "text ", "é日🙂", "<", "<|", "<|tool_call_", "</thi", "'''", ", b='", "<|im_end|>",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)

ANSWERS: list[tuple[str, str | None, str, list[dict[str, Any]], list[str]]] = [
    # text, reasoning, content, arguments of the calls, codes of the errors
    ("Hello", None, "Hello", [], []),
    ("", None, "", [], []),
    (f"A {S}[f(a=1)]{E} B", None, "A  B", [{"a": 1}], []),
    (f"{S}[f(a=1)]{E}{S}[f(a=2)]{E}", None, "", [{"a": 1}, {"a": 2}], []),
    (f"<think>r {S}[f()]{E}</think>\n\nx", f"r {S}[f()]{E}", "\n\nx", [], []),
    (f"\n<think>r</think>{S}[f(a=1)]{E}", "r", "\n", [{"a": 1}], []),
    ("<think></think>x", "", "x", [], []),
    ("<think>a</think>\n<think>b</think>x", "ab", "\nx", [], []),
    (f"{S}[f(a=1)]{E}<think>b {S}[f()]{E}</think>x", f"b {S}[f()]{E}", "x", [{"a": 1}], []),
    ("<think>never closed", "never closed", "", [], []),
    (f"use <think> {S}[f()]{E} </think> ok", None, f"use <think> {S}[f()]{E} </think> ok", [], []),
    (f"use <think> {S}[f(a=1)]{E} ok", None, "use <think>  ok", [{"a": 1}], []),
    ("a </think> b", None, "a </think> b", [], []),
    ("[link text](https://example.org) f(a=1)", None, "[link text](https://example.org) f(a=1)", [], []),
    (f"a {E} b", None, f"a {E} b", [], []),
    (f"{S}[f(a=1)]{E}[f(a=1)]{E}", None, f"[f(a=1)]{E}", [{"a": 1}], []),
    (f"{S}[f(a='{E}')]{E}x", None, "x", [{"a": E}], []),
    (f"{S}[f(a='{S}')]{E}x", None, "x", [{"a": S}], []),
    (f'{S}[f(a="{S}[g()]{E}")]{E}x', None, "x", [{"a": f"{S}[g()]{E}"}], []),
    (f"{S}[f(a='<think>')]{E}x", None, "x", [{"a": "<think>"}], []),
    (f"{S}[f(a='it's ok')]{E} x", None, " x", [{"a": "it's ok"}], []),
    (f"{S}[f(a='it's')]{E} it's {S}[f(a='it's')]{E}", None, " it's ", [{"a": "it's"}] * 2, []),
    (f"{S}[f(a='say 'hi')]{E} there')]{E}", None, f"{S}[f(a='say 'hi')]{E} there')]{E}", [], ["ambiguous_quotes"]),
    (f"{S}[f(a='it's {E} x')]{E}", None, f"{S}[f(a='it's {E} x')]{E}", [], ["syntax"]),
    (f"{S}[f(a='x)]{E} p {S}[f(a=1)]{E}", None, f"{S}[f(a='x)]{E} p ", [{"a": 1}], ["syntax"]),
    (f"{S}[f(a=x)]{E}", None, f"{S}[f(a=x)]{E}", [], ["not_literal"]),
    (f"{S}[f(a=1), f(a=x)]{E}y", None, "f(a=x)y", [{"a": 1}], ["not_literal"]),
    (f"a {S}[f(a=1)]", None, "a ", [{"a": 1}], []),
    (f"{S}[f(a=1), f(a='x", None, "f(a='x", [{"a": 1}], ["truncated"]),
    (f"{S}[f(a=12", None, f"{S}[f(a=12", [], ["truncated"]),
    (f"{S}[f(a='it's ok')]", None, f"{S}[f(a='it's ok')]", [], ["truncated"]),
    (S, None, S, [], ["empty"]),
    (f"{S}[f(a=1)]{S}[f(a=2)]{E}", None, "", [{"a": 1}, {"a": 2}], []),
    (f"{S}[f(a=1){S}[f(a=2)]{E}", None, f"{S}[f(a=1)", [{"a": 2}], ["truncated"]),
    (f"{S}[f(b='']', a='= {S}[g()]{E}')]{E}", None, f"{S}[f(b='']', a='= {S}[g()]{E}')]{E}", [], ["syntax"]),
    (f"{S}[f(a='') {E} x')]{E}", None, f"{S}[f(a='') {E} x')]{E}", [], ["truncated"]),
    (f"{S}[f(a='x')", None, f"{S}[f(a='x')", [], ["truncated"]),
    (f"{S}[f(a=1", None, f"{S}[f(a=1", [], ["truncated"]),
    ("a <|tool_call_start", None, "a <|tool_call_start", [], []),
]  # fmt: skip


def same_ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"call_{next(numbers)}"


def streamed(pieces: Iterable[str], **options: Any) -> ParsedOutput:
    stream = OutputStream(new_id=same_ids(), **options)
    events = [event for piece in pieces for event in stream.feed(piece)] + stream.finish()
    return collect(events, in_reasoning=options.get("in_reasoning", False), is_open=stream.is_reasoning)


def cut(text: str, seed: int) -> list[str]:
    """The text as a decoder gives it that sees its bytes in random pieces."""
    draw = random.Random(seed)
    data, decoder, pieces = text.encode(), codecs.getincrementaldecoder("utf-8")(), []
    while data:
        size = draw.choice([1, 1, 2, 3, 7, 20])
        pieces.append(decoder.decode(data[:size]))
        data = data[size:]
    return pieces


@pytest.mark.parametrize(("text", "reasoning", "content", "arguments", "codes"), ANSWERS)
def test_answer_is_taken_apart(
    text: str, reasoning: str | None, content: str, arguments: list[dict[str, Any]], codes: list[str]
) -> None:
    parsed = parse_output(text)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)
    assert [call.arguments for call in parsed.tool_calls] == arguments
    assert [error.code for error in parsed.errors] == codes


@pytest.mark.parametrize("text", [answer[0] for answer in ANSWERS] + [f"x{S}{entry[0]}{E}y" for entry in LISTS])
def test_characters_one_by_one_give_the_same(text: str) -> None:
    assert streamed(text) == streamed([text])
    assert streamed(text, in_reasoning=True) == streamed([text], in_reasoning=True)


@many
@given(TEXTS, st.integers(0, 99), st.booleans())
def test_cutting_bytes_anywhere_gives_the_same(text: str, seed: int, in_reasoning: bool) -> None:
    assert streamed(cut(text, seed), in_reasoning=in_reasoning) == streamed([text], in_reasoning=in_reasoning)


@many
@given(TEXTS, st.integers(0, 99), st.booleans())
def test_spans_joined_are_the_text(text: str, seed: int, in_reasoning: bool) -> None:
    router = Router(in_reasoning=in_reasoning)
    spans = [span for piece in cut(text, seed) for span in router.feed(piece)] + router.finish()
    assert "".join(span.text for span in spans) == text


@many
@given(TEXTS)
def test_nothing_but_calls_and_markers_is_missing_from_the_output(text: str) -> None:
    """What is left over between the events of a block is brackets, commas and space."""
    router = Router()
    for span in [*router.feed(text), *router.finish()]:
        if span.kind != "block":
            continue
        parsed = parse_output(span.text)
        rest = span.text
        for part in [call.text for call in parsed.tool_calls] + [error.text for error in parsed.errors]:
            assert part in rest
            rest = rest.replace(part, "", 1)
        if parsed.tool_calls:
            assert set(rest.replace(S, "").replace(E, "")) <= set("[], \n")
            assert all(error.text in parsed.content for error in parsed.errors)
        else:
            assert parsed.content == span.text


def test_the_comparison_of_cuts_notices_a_router_that_forgets() -> None:
    class Forgetful(Router):
        def feed(self, text: str) -> list[Span]:
            self._held = ""
            return super().feed(text)

    router = Forgetful()
    text = f"a {S}[f()]{E}"
    spans = [span for piece in text for span in router.feed(piece)] + router.finish()
    assert "".join(span.text for span in spans) != text


@pytest.mark.parametrize("text", ["plain < text, 1 <| 2 [f(a=1)] ", "x </thinking> <tool_call> y "])
def test_text_that_cannot_become_a_marker_is_not_held_back(text: str) -> None:
    stream, shown = OutputStream(), ""
    for end in range(1, len(text) + 1):
        for event in stream.feed(text[end - 1]):
            assert isinstance(event, ContentDelta)
            shown += event.text
        held = text[len(shown) : end]
        assert not held or any(marker.startswith(held) for marker in (S, THINK_START, THINK_END))
    assert shown == text


def test_reasoning_flows_past_the_markers_of_calls() -> None:
    stream = OutputStream(in_reasoning=True)
    assert stream.feed("a <|tool") == [ReasoningDelta(text="a <|tool")]
    assert stream.feed("</thi") == []
    assert stream.feed("s") == [ReasoningDelta(text="</this")]


def test_call_comes_as_soon_as_its_block_ends_and_prose_after_it_flows() -> None:
    stream = OutputStream()
    assert stream.feed(f"{S}[f(a='x')]") == []
    (done,) = stream.feed(E)
    assert isinstance(done, ToolCallDone)
    assert stream.feed("now") == [ContentDelta(text="now")]


def test_answer_that_begins_in_reasoning() -> None:
    parsed = parse_output(f"r {S}[f()]{E}</think>x", in_reasoning=True)
    assert (parsed.reasoning, parsed.content, parsed.tool_calls) == (f"r {S}[f()]{E}", "x", ())
    assert parse_output("r", in_reasoning=True).is_reasoning_open
    assert not parse_output("r").is_reasoning_open
    assert parse_output("", in_reasoning=True).reasoning == ""


def test_markers_come_as_tokens_without_text() -> None:
    stream = OutputStream(marker_tokens={10: S, 11: E}, new_id=lambda: "id")
    events: list[OutputEvent] = []
    for text, token_id in [("a", 1), ("", 10), ("[f()]", 2), ("", 11), ("b", 3), (S, 10), ("[f()]", 2), (E, 11)]:
        events += stream.feed(text, token_id)
    call = ToolCall(id="id", name="f", arguments={}, text="f()")
    done = ToolCallDone(call=call)
    assert events + stream.finish() == [ContentDelta(text="a"), done, ContentDelta(text="b"), done]


def test_ids_are_distinct_and_arguments_are_json() -> None:
    parsed = parse_output(f"{S}[f(a='é'), f(a='é')]{E}{S}[f()]{E}")
    ids = {call.id for call in parsed.tool_calls}
    assert len(ids) == 3
    assert all(len(identity) == 29 and identity.startswith("call_") for identity in ids)
    assert [call.arguments_json for call in parsed.tool_calls] == ['{"a": "é"}', '{"a": "é"}', "{}"]


NAMES = st.text(st.sampled_from("abcdefgh_é"), min_size=1, max_size=6)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.sampled_from("ab'\"\\\n\r\t\x00,)]}=[({ é🙂") | st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(FRAGMENTS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES | st.text(max_size=4), VALUE, max_size=4)), max_size=3)


@few
@given(CALLS.filter(bool), st.integers(0, 99))
def test_rendered_calls_read_as_they_were(calls: list[tuple[str, dict[str, Any]]], seed: int) -> None:
    text = render_calls(ToolCall(id="", name=name, arguments=arguments) for name, arguments in calls)
    parsed = streamed(cut(text + "after", seed))
    assert repr([(call.name, call.arguments) for call in parsed.tool_calls]) == repr(_last_named(calls))
    assert (parsed.content, parsed.errors) == ("after", ())


def _last_named(calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Arguments whose names cannot be written before `=` are rendered last."""
    rendered = [parse_output(render_calls([ToolCall(id="", name=n, arguments=a)])).tool_calls[0] for n, a in calls]
    assert all(call.arguments == arguments for call, (_, arguments) in zip(rendered, calls, strict=True))
    return [(call.name, call.arguments) for call in rendered]


TEMPLATE = """<|tool_call_start|>[
{%- for call in calls -%}{{ call.name }}(
{%- for key, value in call.arguments.items() -%}
{{ key }}={% if value is string %}'{{ value.replace('\\\\', '\\\\\\\\').replace("'", "\\\\'") }}'
{%- elif value is none %}None{% elif value is mapping or value is iterable %}{{ value | json }}
{%- else %}{{ value }}{% endif %}{{ "" if loop.last else ", " }}
{%- endfor -%}){{ "" if loop.last else ", " }}
{%- endfor -%}]<|tool_call_end|>"""


@few
@given(st.dictionaries(NAMES.filter(str.isidentifier), VALUE, max_size=4))
def test_arguments_rendered_by_a_template_read_as_they_were(arguments: dict[str, Any]) -> None:
    environment = jinja2.Environment()
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = environment.from_string(TEMPLATE).render(calls=[{"name": "f", "arguments": arguments}])
    (call,) = parse_output(text).tool_calls
    assert repr(call.arguments) == repr(arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [("f g", 1), ("", 1), ("f", float("inf")), ("f", b"x"), ("f", {1: 2}), ("f", [10**5000]), ("f", "\ud800")],
)
def test_what_cannot_be_read_back_is_not_rendered(name: str, value: Any) -> None:
    with pytest.raises(OptionError):
        render_calls([ToolCall(id="", name=name, arguments={"a": value})])


def test_corpus_is_large() -> None:
    assert len(VALUES) + len(REFUSED_VALUES) + len(LISTS) + len(ANSWERS) > 200


@pytest.mark.parametrize(
    "unit",
    [S, E, S + E, f"{S}[f('{E}", f'{S}[f("{E}{S}[f\\"{E}', f"{S}[f(a='it's')]{E}", "<", "<|tool_call_star",
     THINK_START, f"x{THINK_START}{S}{THINK_END}", f"x{THINK_START}{S}"],
)  # fmt: skip
@pytest.mark.parametrize("opening", ["", f"{S}[f(a='", f"{S}[f(a='it's')]{E}"])
def test_markers_without_end_are_routed_once(unit: str, opening: str) -> None:
    text = opening + unit * (30_000 // len(unit))
    router = Router()
    steps = 0
    step = router._step

    def counted(work: str, at: int, spans: list[Span]) -> tuple[str, int]:
        nonlocal steps
        steps += 1
        return step(work, at, spans)

    router._step = counted  # type: ignore[method-assign]
    spans = router.feed(text) + router.finish()
    assert "".join(span.text for span in spans) == text
    assert steps <= 10 * (text.count("<") + 10)


def test_parsed_output_is_a_value() -> None:
    parsed = parse_output("x")
    assert replace(parsed, content="y") != parsed


@many
@given(TEXTS)
def test_merged_events_are_the_same_answer_in_fewer(text: str) -> None:
    stream = OutputStream()
    events = [event for character in text for event in stream.feed(character)] + stream.finish()
    fewer = merged(events)
    assert collect(fewer) == collect(events)
    neighbours = [type(before) for before, event in itertools.pairwise(fewer) if type(before) is type(event)]
    assert not {ContentDelta, ReasoningDelta} & set(neighbours)
