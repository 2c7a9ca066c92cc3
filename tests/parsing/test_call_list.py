import ast
import itertools
import json
import random
import re
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_call_corpus import LISTS, REFUSED_VALUES, VALUES, WEATHER, WITH_TOOLS, Expected

from lfm_mlx.parsing import parse_output
from lfm_mlx.parsing.call_list import (
    MAX_CALLS,
    MAX_REPAIR_STEPS,
    MAX_STEPS,
    ReadCall,
    UnreadCall,
    _CallList,
    read_call_list,
)
from lfm_mlx.parsing.item_reader import MAX_DEPTH
from lfm_mlx.tokenizer.special import TOOL_CALL_END, TOOL_CALL_START

many = settings(max_examples=60, deadline=None)


def outcome(payload: str, tools: list[dict[str, Any]] | None = None) -> tuple[Expected, Expected]:
    parsed = parse_output(f"{TOOL_CALL_START}{payload}{TOOL_CALL_END}", tools)
    return [(call.name, call.arguments) for call in parsed.tool_calls], [error.code for error in parsed.errors]


def assert_reads_as(payload: str, expected: Expected, tools: list[dict[str, Any]] | None = None) -> None:
    calls, codes = outcome(payload, tools)
    assert calls == [entry for entry in expected if not isinstance(entry, str)]
    assert codes == [entry for entry in expected if isinstance(entry, str)]
    # Equality alone does not tell True from 1, or 1 from 1.0.
    assert repr(calls) == repr([entry for entry in expected if not isinstance(entry, str)])


@pytest.mark.parametrize("text", VALUES)
@pytest.mark.parametrize("form", ["[f(a={})]", "[f(b=1, a={}, c='z')]"])
def test_literal_becomes_its_value(text: str, form: str) -> None:
    calls, codes = outcome(form.format(text) if "{}" in form else form)
    assert codes == []
    assert repr(calls[0][1]["a"]) == repr(VALUES[text])


@pytest.mark.parametrize("text", REFUSED_VALUES, ids=lambda text: text[:30])
def test_what_is_no_json_value_is_refused_alone(text: str) -> None:
    assert_reads_as("[f(a=" + text + ")]", [REFUSED_VALUES[text]])
    assert_reads_as(
        "[f(q='ok'), f(a=" + text + "), f(n=1)]", [("f", {"q": "ok"}), REFUSED_VALUES[text], ("f", {"n": 1})]
    )


@pytest.mark.parametrize(("payload", "expected"), LISTS)
def test_list_reads_as(payload: str, expected: Expected) -> None:
    assert_reads_as(payload, expected)


@pytest.mark.parametrize(("payload", "expected"), WITH_TOOLS)
def test_list_with_schema_reads_as(payload: str, expected: Expected) -> None:
    assert_reads_as(payload, expected, [WEATHER])


def test_no_warning_is_printed_for_a_backslash() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert outcome(r'[search(query="\d+")]')[0] == [("search", {"query": r"\d+"})]


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@many
@given(LITERALS)
def test_python_repr_reads_like_literal_eval(value: Any) -> None:
    text = repr(value)
    (call,) = read_call_list(f"[f(a={text})]")
    assert isinstance(call, ReadCall)
    assert repr(call.arguments["a"]) == repr(ast.literal_eval(text))


@many
@given(st.dictionaries(st.text(max_size=5), LITERALS, max_size=4), st.booleans())
def test_json_form_reads_like_json(arguments: dict[str, Any], is_ascii: bool) -> None:
    text = json.dumps([{"name": "f", "arguments": arguments}], ensure_ascii=is_ascii)
    (call,) = read_call_list(text)
    assert isinstance(call, ReadCall)
    assert repr(call.arguments) == repr(json.loads(text)[0]["arguments"])


@many
@given(st.text(st.sampled_from("fab(,)[]{}='\":1 \\\n-.*"), max_size=60))
def test_what_literal_eval_reads_is_never_read_otherwise(text: str) -> None:
    """Of damaged text a call may be refused; where Python reads the values, ours are the same."""
    try:
        tree = ast.parse(f"f(a={text})", mode="eval").body
        assert isinstance(tree, ast.Call)
        expected = {keyword.arg: ast.literal_eval(keyword.value) for keyword in tree.keywords}
        is_plain = not tree.args and None not in expected and isinstance(tree.func, ast.Name)
    except (SyntaxError, ValueError, TypeError, AssertionError):
        return
    readings = read_call_list(f"[f(a={text})]")
    if is_plain and all(isinstance(reading, ReadCall) for reading in readings):
        assert len(readings) == 1
        assert _as_json(expected) == readings[0].arguments


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return [_as_json(entry) for entry in value] if isinstance(value, list | tuple | set) else value


@many
@given(st.text(st.sampled_from("fg(,)[]{}='\"1 ax\n"), max_size=80))
def test_calls_stand_in_order_and_apart(payload: str) -> None:
    readings = read_call_list(payload)
    places = [(reading.start, reading.end) for reading in readings]
    assert all(start <= end for start, end in places)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(places))


@many
@given(st.text(st.sampled_from("ab'\" ,=:;-"), max_size=20).filter(lambda value: "'" in value))
def test_repaired_value_is_the_text_between_the_outer_quotes(value: str) -> None:
    """An argument alone in its call, quotes not escaped: the text as it stands, or refused."""
    readings = read_call_list(f"[f(a='{value}')]")
    for reading in readings:
        is_python = not _breaks(f"'{value}'")
        if isinstance(reading, ReadCall) and not is_python:
            assert reading.arguments == {"a": value}


PIECES = (
    "'", '"', "'''", '"""', "it's", ", ", ")", "(", "[", "]", "{", "}", ": ", "=", "f(", "x", "1", " ", "\n", "\\.",
    "\\'", "\\n", TOOL_CALL_START, TOOL_CALL_END, TOOL_CALL_END + " ", "r'", "+", "#", " or ", "</think>",
)  # fmt: skip
# A value that spells the border of the next argument or call cannot be told from one.
BORDER = re.compile(r"'\s*\)\s*,\s*\w+\s*\(|'\s*,\s*\w+\s*=")


def raw_arguments(rng: random.Random) -> dict[str, Any]:
    values = ("".join(rng.choices(PIECES, k=rng.randint(0, 6))) for _ in range(3))
    names = rng.sample("abc", rng.randint(1, 3))
    return {name: 1 if BORDER.search(value) else value for name, value in zip(names, values, strict=False)}


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_values_rendered_without_escapes_come_back_as_they_were_or_not_at_all() -> None:
    """As LFM2.5's template renders past calls, and models then write them."""
    rng = random.Random(0)
    num_read = 0
    for _ in range(1500):
        calls = [raw_arguments(rng) for _ in range(rng.randint(1, 3))]
        rendered = (
            ", ".join(f"{key}='{value}'" if isinstance(value, str) else f"{key}={value}" for key, value in one.items())
            for one in calls
        )
        payload = ", ".join(f"f({arguments})" for arguments in rendered)
        meant = [{key: _unquoted(value) for key, value in one.items()} for one in calls]
        for call in parse_output(f"{TOOL_CALL_START}[{payload}]{TOOL_CALL_END}").tool_calls:
            num_read += 1
            is_meant = {key: _unquoted(value) for key, value in call.arguments.items()} in meant
            assert is_meant or call.arguments == _as_python(call.text), (payload, call)
    assert num_read > 500


def _unquoted(value: Any) -> Any:
    """Backslashes and newlines aside: what a literal without other damage means is not the question here."""
    return re.sub(r"\\n|[\\\n]", "", value) if isinstance(value, str) else value


def _as_python(text: str) -> dict[str | None, Any] | None:
    try:
        call = ast.parse(text, mode="eval").body
        assert isinstance(call, ast.Call)
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        return None


def _breaks(text: str) -> bool:
    try:
        ast.parse(f"f(a={text})")
    except (SyntaxError, ValueError):
        return True
    return False


@pytest.mark.parametrize("depth", [1, MAX_DEPTH])
def test_nesting_up_to_the_limit_is_read(depth: int) -> None:
    (call,) = read_call_list("[f(a=" + "[" * depth + "]" * depth + ")]")
    assert isinstance(call, ReadCall)


@pytest.mark.parametrize(
    "unit",
    [
        "[",
        "(",
        "f(",
        "{'a':",
        "'",
        '"',
        "'''",
        "' ",
        "', ",
        "')",
        "\\'",
        ", b='don't'",
        "', b=1+1",
        '\', c="x"z',
        "1,",
        "x'y,",
    ],
)
def test_steps_grow_no_faster_than_the_text(unit: str) -> None:
    def num_steps(size: int) -> int:
        text = "[f(a='q'q" + unit * (size // len(unit)) + ")]"
        calls = _CallList(text, len(text) - 1, True)
        before = calls._steps_left
        calls.read(1)
        return before - calls._steps_left

    small, large = num_steps(1_000), num_steps(20_000)
    assert large <= 40 * small + MAX_REPAIR_STEPS
    assert large <= MAX_STEPS + 2 * MAX_REPAIR_STEPS


@pytest.mark.parametrize("unit", ["[", "(", "'", '"', "f(", "\\", "{'a':", "9", "a", " ", "('", "f(a='b'c'),", "',\""])
@pytest.mark.parametrize("opening", ["", "[f(a=", "[f(a='"])
def test_hostile_text_comes_back_with_an_error(unit: str, opening: str) -> None:
    readings = read_call_list(opening + unit * (20_000 // len(unit)))
    assert all(isinstance(reading, UnreadCall) for reading in readings) or unit == "f(a='b'c'),"


@pytest.mark.parametrize("call", ["f(a=1)", "f(a='b'c')", "f(a=1+2)"])
def test_too_many_calls_are_cut_off_with_an_error(call: str) -> None:
    readings = read_call_list("[" + ", ".join([call] * (MAX_CALLS + 5)) + "]")
    assert isinstance(readings[-1], UnreadCall)
    assert readings[-1].problem.code == "too_long"
    assert len(readings) <= MAX_CALLS + 1


def test_a_long_string_is_read() -> None:
    (call,) = read_call_list("[f(a='" + "it is long, " * 90_000 + "')]")
    assert isinstance(call, ReadCall)
    assert len(call.arguments["a"]) == 12 * 90_000


def test_a_long_list_is_read() -> None:
    (call,) = read_call_list("[f(a=[" + "1, " * 20_000 + "])]")
    assert isinstance(call, ReadCall)
    assert call.arguments["a"] == [1] * 20_000
