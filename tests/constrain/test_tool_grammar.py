from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import tool_cases
from drawing import accepts_text, answers, read_json, read_pythonic
from tool_cases import OPTIONAL, TOOLS, WEATHER, function

from lfm_mlx.constrain import GrammarTokenizer, ToolCalls
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
READERS = {"pythonic": read_pythonic, "json": read_json}


def required(tools: list[dict[str, Any]], **options: Any) -> ToolCalls:
    return ToolCalls(tools, **{"tool_choice": "required", "reasoning": "forbidden", **options})


@pytest.mark.parametrize("form", ["pythonic", "json"])
@pytest.mark.parametrize("tool", TOOLS, ids=tool_cases.name)
def test_drawn_calls_read_back_and_their_arguments_are_valid(
    tool: dict[str, Any], form: Any, vocabulary: GrammarTokenizer
) -> None:
    schema = tool_cases.parameters(tool)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for answer in answers(required([tool], form=form), vocabulary, 30, max_tokens=250):
        assert answer.text.startswith(START)
        assert answer.text.endswith(END)
        for name, arguments in READERS[form](answer.text[len(START) : -len(END)]):
            assert name == tool_cases.name(tool)
            validator.validate(arguments)
            assert set(arguments) <= set(schema.get("properties", {}))
            json.dumps(arguments, allow_nan=False)


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_drawn_calls_of_many_tools_are_calls_of_these_tools(form: Any, vocabulary: GrammarTokenizer) -> None:
    schemas = {tool_cases.name(tool): tool_cases.parameters(tool) for tool in TOOLS}
    seen = set()
    for answer in answers(required(TOOLS, form=form), vocabulary, 60, max_tokens=250):
        for name, arguments in READERS[form](answer.text[len(START) : -len(END)]):
            jsonschema.validate(arguments, schemas[name])
            seen.add(name)
    assert len(seen) >= 5


@pytest.mark.parametrize(
    ("calls", "is_accepted"),
    [
        ("""[get_weather(city="Paris")]""", True),
        ("""[get_weather(city='Paris', unit="celsius")]""", True),
        ("""[get_weather(city="a",unit='celsius')]""", True),
        (r"""[get_weather(city='Martha\'s \"x\" \\ \n')]""", True),
        ("""[get_weather(city="it's")]""", True),
        ("""[get_weather(city="a"), get_weather(city="b")]""", True),
        ("""[get_weather(city="a"), optional(a=1, d=2), optional()]""", True),
        ("""[get_weather()]""", False),
        ("""[get_weather(unit="celsius")]""", False),
        ("""[get_weather(city="a", city="b")]""", False),
        ("""[get_weather(city="a", unit="kelvin")]""", False),
        ("""[get_weather(city="a", country="b")]""", False),
        ("""[get_weather(city=3)]""", False),
        ("""[get_weather("Paris")]""", False),
        ("""[get_weather(city="a\nb")]""", False),
        (r"""[get_weather(city="\d")]""", False),
        ("""[get_weather(city='it's')]""", False),
        ("""[get_news(city="a")]""", False),
        ("""[optional(a=10)]""", False),
        ("""[optional(b=1, a=1)]""", False),
        ("""[optional(a=1,)]""", False),
        ("""[]""", False),
        ("""get_weather(city="a")""", False),
    ],
)
def test_only_well_formed_calls_are_accepted(
    calls: str, is_accepted: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    constraint = required([WEATHER, OPTIONAL])
    assert accepts_text(constraint, vocabulary, tokenizer, START + calls + END) is is_accepted
    assert not accepts_text(constraint, vocabulary, tokenizer, calls)
    assert not accepts_text(constraint, vocabulary, tokenizer, START + calls)


@pytest.mark.parametrize(
    ("calls", "is_accepted"),
    [
        ("""[{"name": "get_weather", "arguments": {"city": "Paris"}}]""", True),
        (
            """[{"name": "get_weather", "arguments": {"city":"a"}},{"name": "optional", "arguments": {}}]""",
            True,
        ),
        ("""[{"name": "get_weather", "arguments": {}}]""", False),
        ("""[{"name": "get_weather", "arguments": {'city': 'Paris'}}]""", False),
        ("""[{"name": "get_news", "arguments": {}}]""", False),
        ("""[{"arguments": {}, "name": "optional"}]""", False),
        ("""{"name": "optional", "arguments": {}}""", False),
        ("""[optional()]""", False),
    ],
)
def test_the_json_form_accepts_only_well_formed_calls(
    calls: str, is_accepted: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    constraint = required([WEATHER, OPTIONAL], form="json")
    assert accepts_text(constraint, vocabulary, tokenizer, START + calls + END) is is_accepted


@pytest.mark.parametrize(
    ("present", "is_accepted"), [("", True), ("a", True), ("bd", True), ("abcd", True), ("dc", False)]
)
@pytest.mark.parametrize("required_names", ["", "b", "bd", "a"])
def test_optional_arguments_may_be_left_out_anywhere(
    present: str, is_accepted: bool, required_names: str, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    tool = function("f", {name: {"type": "integer"} for name in "abcd"}, list(required_names))
    text = f"{START}[f({', '.join(f'{name}=1' for name in present)})]{END}"
    expected = is_accepted and set(required_names) <= set(present)
    assert accepts_text(required([tool]), vocabulary, tokenizer, text) is expected


@pytest.mark.parametrize(
    ("value", "schema", "is_accepted"),
    [
        ("True", {"type": "boolean"}, True),
        ("true", {"type": "boolean"}, False),
        ("None", {"type": ["string", "null"]}, True),
        ("null", {"type": ["string", "null"]}, False),
        ("[True, false]", {"type": "array", "items": {"type": "boolean"}}, True),
        ("{'a': null, \"b\": None}", {"type": "object"}, True),
        ("{'a': 1}", {"type": "object", "properties": {"a": {"type": "integer"}}}, True),
        ("['x', \"y\"]", {"type": "array", "items": {"type": "string"}}, True),
        ("-1.5e3", {"type": "number"}, True),
        ("1e999", {"type": "number"}, False),
        ("[1e999]", {"type": "array", "items": {"type": "number"}}, False),
        ("[1e999]", {}, False),
        ("[1, [2, {'x': ['y']}]]", {}, True),
        ("07", {"type": "integer"}, False),
        ("12345678901234567890", {"type": "integer"}, False),
        ("1.0", {"type": "integer"}, False),
    ],
)
def test_values_are_literals_of_the_schemas_type(
    value: str, schema: dict[str, Any], is_accepted: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    text = f"{START}[f(x={value})]{END}"
    assert accepts_text(required([function("f", {"x": schema})]), vocabulary, tokenizer, text) is is_accepted


def test_a_named_tool_is_the_only_one(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    constraint = required([WEATHER, OPTIONAL], tool_choice="optional")
    assert accepts_text(constraint, vocabulary, tokenizer, f"{START}[optional()]{END}")
    assert not accepts_text(constraint, vocabulary, tokenizer, f'{START}[get_weather(city="a")]{END}')


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_without_parallel_calls_there_is_exactly_one(form: Any, vocabulary: GrammarTokenizer) -> None:
    tools = [OPTIONAL, tool_cases.MCP]
    counts = {
        is_parallel: {
            len(READERS[form](answer.text[len(START) : -len(END)]))
            for answer in answers(required(tools, form=form, is_parallel=is_parallel), vocabulary, 40)
        }
        for is_parallel in (False, True)
    }
    assert counts[False] == {1}
    assert max(counts[True]) > 1


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([function("f", {"a": {"type": "array", "uniqueItems": True}})], "parameters#/properties/a/uniqueItems"),
        ([function("f", {"a": {"not": {}}})], "tool 'f'"),
        ([function("f", {"a": {"type": "string", "pattern": "(?=a)"}})], "look-around"),
        ([function("f", {"a": {"anyOf": [{"type": "integer"}, {"oneOf": [{}, {"minLength": 1}]}]}})], "oneOf"),
        ([function("f", {"a": {"type": "integer", "minimum": 3, "maximum": 2}})], "minimum 3"),
        ([function("f", {"a": {"type": "integer", "minimum": 10**30}})], "no integer of up to 19 digits"),
        ([function("f", {"a": {"type": "integer", "maximum": -(10**30)}})], "no integer of up to 19 digits"),
        ([function("f", {"a": {"minItems": 3, "maxItems": 2, "type": "array"}})], "minItems"),
        ([function("f", {"a": False}, ["a"])], "false"),
        ([function("f", {"a-b": {}})], "'a-b'"),
        ([function("f", {}, anyOf=[{}])], "'anyOf'"),
        ([function("f", {}, minProperties=1)], "'minProperties'"),
        ([function("f", {}, type="array")], "object"),
        ([function("f g", {})], "tool 'f g'"),
        ([function("f", {}), function("f", {})], "'f'"),
        ([{"description": "x"}], "tools[0] has no name"),
        ([3], "tools[0]"),
        ([{"name": "f", "parameters": []}], "parameters"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(tools: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        required(tools)
    assert expected in str(caught.value)


def test_names_that_python_cannot_write_are_fine_in_the_json_form(
    vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    constraint = required([function("f g", {"a-b": {"type": "integer"}}, ["a-b"])], form="json")
    text = f'{START}[{{"name": "f g", "arguments": {{"a-b": 1}}}}]{END}'
    assert accepts_text(constraint, vocabulary, tokenizer, text)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tool_choice": "maybe"}, "tool_choice is 'maybe'"),
        ({"form": "xml"}, "form is 'xml'"),
        ({"reasoning": "some"}, "reasoning is 'some'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        required([WEATHER], **options)
    assert expected in str(caught.value)


def test_required_needs_a_tool() -> None:
    with pytest.raises(OptionError, match="no tools"):
        required([])


MIXED = [
    {"anyOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"type": "object"}]},
    {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "array"}, {"type": "string"}]},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 130}, "minItems": 1},
]


@pytest.mark.parametrize("form", ["pythonic", "json"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ('{"a": 1}', [True, False, False]),
        ('{"a": "x"}', [True, False, False]),
        ('{"ab": {"a": []}}', [True, False, False]),
        ("[1, 2]", [False, True, False]),
        ('[1, "x"]', [False, True, False]),
        ('["x", [1]]', [False, True, False]),
        ('"x"', [False, True, False]),
        ("[[1], [], [2, 3]]", [False, True, True]),
        (f"[{[1] * 130}]", [False, True, True]),
        (f"[{[1] * 131}]", [False, True, False]),
    ],
)
def test_alternatives_that_begin_alike_are_all_open(
    value: str, expected: list[bool], form: Any, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    """Also where one of them is no regular language, and beside a tool whose calls are one."""
    text = f"[f(x={value})]" if form == "pythonic" else f'[{{"name": "f", "arguments": {{"x": {value}}}}}]'
    for schema, is_accepted in zip(MIXED, expected, strict=True):
        constraint = required([WEATHER, function("f", {"x": schema}, ["x"])], form=form)
        assert accepts_text(constraint, vocabulary, tokenizer, START + text + END) is is_accepted


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_a_tool_is_checked_although_one_like_it_was_before(form: Any) -> None:
    shared = {"a": {"type": "string", "description": "One."}, "b": {"type": "array", "items": {"type": "number"}}}
    for refused in ({"not": {}}, {"type": "string", "x-guidance": {}}, {"type": "array", "items": {"not": {}}}):
        tools = [function("f", shared), function("g", {**shared, "c": refused})]
        with pytest.raises(OptionError, match="tool 'g': parameters#/properties/c"):
            required(tools, form=form)
    with pytest.raises(OptionError, match="tool 'h': parameters is not JSON"):
        required([function("f", shared), function("h", {"a": {"default": {1}}})], form=form)
