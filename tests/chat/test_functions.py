"""Tools from Python functions, and from what servers hand out."""

from __future__ import annotations

import asyncio
import datetime
import enum
import json
import types
import typing
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NewType, Optional, TypedDict, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_mlx.chat.functions import FunctionTool, as_tools, read_docstring, tool, tool_from_function
from lfm_mlx.constrain.schema_check import check_schema
from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.schemas import checked_arguments, tool_schemas


class Unit(enum.Enum):
    CELSIUS = "celsius"
    FAHRENHEIT = "fahrenheit"


class Shape(enum.Enum):
    ROUND = object()


class Options(TypedDict, total=False):
    depth: int


@dataclass
class Place:
    """A place.

    Args:
        city: its town.
    """

    city: str
    country: str = "FR"
    tags: list[str] = field(default_factory=list)


@dataclass
class Tree:
    left: Tree | None


City = NewType("City", str)


def make(annotation: Any, default: Any = ...) -> Callable[..., Any]:
    """A function with one parameter, which it returns."""
    if default is ...:

        def function(x):  # type: ignore[no-untyped-def]
            return x

    else:

        def function(x=default):  # type: ignore[no-untyped-def]
            return x

    if annotation is not ...:
        function.__annotations__ = {"x": annotation}
    return function


def schema_of(annotation: Any, default: Any = ...) -> dict[str, Any]:
    parameters = tool_from_function(make(annotation, default))["function"]["parameters"]
    check_schema(parameters)
    return dict(parameters["properties"]["x"])


def read_as(annotation: Any, value: Any) -> Any:
    seen = []
    function = make(annotation)
    one = FunctionTool(definition=tool_from_function(function), function=lambda x: seen.append(x))
    one.__dict__["_arguments"] = FunctionTool.from_function(function)._arguments
    one.call({"x": value})
    return seen[0]


CASES: list[tuple[Any, dict[str, Any], Any, Any]] = [
    (str, {"type": "string"}, "a", "a"),
    (int, {"type": "integer"}, 3.0, 3),
    (float, {"type": "number"}, 3, 3.0),
    (bool, {"type": "boolean"}, True, True),
    (None, {"type": "null"}, None, None),
    (Any, {}, [1, "x"], [1, "x"]),
    (..., {}, {"a": 1}, {"a": 1}),
    (list, {"type": "array"}, [1], [1]),
    (list[int], {"type": "array", "items": {"type": "integer"}}, [1, 2], [1, 2]),
    (Sequence[str], {"type": "array", "items": {"type": "string"}}, ["a"], ["a"]),
    (set[int], {"type": "array", "items": {"type": "integer"}}, [1, 1], {1}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}, [1, 2], (1, 2)),
    (
        tuple[int, str],
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
        [1, "a"],
        (1, "a"),
    ),
    (dict, {"type": "object"}, {"a": 1}, {"a": 1}),
    (
        dict[str, list[Path]],
        {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}},
        {"a": ["b/c"]},
        {"a": [Path("b/c")]},
    ),
    (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}, "b", "b"),
    (Literal[1, "b", None], {"enum": [1, "b", None]}, None, None),
    (Unit, {"type": "string", "enum": ["celsius", "fahrenheit"]}, "celsius", Unit.CELSIUS),
    (Shape, {"type": "string", "enum": ["ROUND"]}, "ROUND", Shape.ROUND),
    (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, None),
    (Optional[Unit], {"anyOf": [{"type": "string", "enum": ["celsius", "fahrenheit"]}, {"type": "null"}]},  # noqa: UP045
     "fahrenheit", Unit.FAHRENHEIT),
    (Union[datetime.date, str],  # noqa: UP007
     {"anyOf": [{"type": "string", "format": "date"}, {"type": "string"}]}, "soon", "soon"),
    (Annotated[int, "how many"], {"type": "integer", "description": "how many"}, 2, 2),
    (list[Annotated[int, "one"]], {"type": "array", "items": {"type": "integer", "description": "one"}}, [2], [2]),
    (City, {"type": "string"}, "Rome", "Rome"),
    (datetime.date, {"type": "string", "format": "date"}, "2025-02-03", datetime.date(2025, 2, 3)),
    (
        datetime.datetime,
        {"type": "string", "format": "date-time"},
        "2025-02-03T04:05:06Z",
        datetime.datetime(2025, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc),
    ),
    (Path, {"type": "string"}, "a/b", Path("a/b")),
    (uuid.UUID, {"type": "string", "format": "uuid"}, str(uuid.UUID(int=5)), uuid.UUID(int=5)),
    (Options, {"type": "object", "properties": {"depth": {"type": "integer"}}}, {"depth": 2}, {"depth": 2}),
    (
        Place,
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its town."},
                "country": {"type": "string", "default": "FR"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
        {"city": "Nice"},
        Place("Nice"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("annotation", "schema", "given", "read"), CASES, ids=[str(case[0]) for case in CASES])
def test_a_type_hint_has_a_schema_and_reads_what_the_schema_allows(
    annotation: Any, schema: dict[str, Any], given: Any, read: Any
) -> None:
    assert schema_of(annotation) == schema
    value = read_as(annotation, given)
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (str, 3, "arguments: x is 3, expected a string"),
        (int, True, "x is True, expected a whole number"),
        (int, 2.5, "x is 2.5, expected a whole number"),
        (float, "1", "x is '1', expected a number"),
        (float, 10**400, "x is 1000.*expected a number"),
        (list[int], [1, "a"], r"x\[1\] is 'a', expected a whole number"),
        (list[int], "ab", "x is 'ab', expected a list"),
        (tuple[int, int], [1], r"x is \[1\], expected a list of 2"),
        (Unit, "kelvin", "x is 'kelvin', expected one of 'celsius', 'fahrenheit'"),
        (Literal[1], True, "x is True, expected one of 1"),
        (Literal["a"], ["a"], "expected one of 'a'"),
        (int | None, "a", "x is 'a', expected a value of .*integer"),
        (datetime.date, "tomorrow", "x is 'tomorrow', expected a string that is a date"),
        (Place, {"town": "a"}, "x hold 'town', expected only city, country, tags"),
        (Place, {"country": "a"}, "x lack 'city'"),
        (Place, {"city": 1}, "x: city is 1, expected a string"),
        (dict[str, int], {"a": None}, r"x\['a'\] is None"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_its_place(annotation: Any, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_as(annotation, value)


@pytest.mark.parametrize(
    "annotation", [bytes, complex, dict[int, str], Callable, "Missing", Tree, list[bytes]], ids=str
)
def test_a_type_hint_without_json_form_is_refused_by_function_and_parameter(annotation: Any) -> None:
    with pytest.raises(OptionError, match=r"^function: (parameter 'x'|the signature)"):
        tool_from_function(make(annotation))


def test_parameters_that_have_no_name_are_refused() -> None:
    def rest(*values: int) -> None: ...
    def more(**values: int) -> None: ...
    def only(value: int, /) -> None: ...

    for function, name in ((rest, r"\*values: 'int'|\*values: int"), (more, r"\*\*values"), (only, "value")):
        with pytest.raises(OptionError, match=name):
            tool_from_function(function)
    with pytest.raises(OptionError, match="write one with `def`"):
        tool_from_function(lambda x: x)


def test_a_default_makes_a_parameter_optional_and_none_makes_it_nullable() -> None:
    odd_one = object()

    def search(
        query: str,
        limit: int = 5,
        unit: Unit = Unit.CELSIUS,
        where: Path = None,  # type: ignore[assignment] # noqa: RUF013
        odd: Any = odd_one,
    ) -> None: ...

    parameters = tool_from_function(search)["function"]["parameters"]
    assert parameters["required"] == ["query"]
    assert parameters["properties"]["limit"] == {"type": "integer", "default": 5}
    assert parameters["properties"]["unit"]["default"] == "celsius"
    assert parameters["properties"]["where"] == {"anyOf": [{"type": "string"}, {"type": "null"}]}
    assert parameters["properties"]["odd"] == {}
    assert "required" not in tool_from_function(make(int, 3))["function"]["parameters"]


GOOGLE = """Look up the weather,
    today.

    More about it: nothing.

    Args:
        city (str): the town,
            or a village: small ones too
        days: how many

    Returns:
        city: not this one
    """
NUMPY = """Look up the weather,
    today.

    Parameters
    ----------
    city : str
        the town,
        or a village: small ones too
    days : int, optional
        how many

    Returns
    -------
    city : str
        not this one
    """
SPHINX = """Look up the weather,
    today.

    :param str city: the town,
        or a village: small ones too
    :param days: how many
    :type days: int
    :returns: not this one
    """


@pytest.mark.parametrize("docstring", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_descriptions_are_read_in_every_style(docstring: str) -> None:
    def get_weather(city: str, days: Annotated[int, "at most 9"] = 1) -> None: ...

    get_weather.__doc__ = docstring
    function = tool_from_function(get_weather)["function"]
    assert function["description"] == "Look up the weather, today."
    assert function["parameters"]["properties"] == {
        "city": {"type": "string", "description": "the town, or a village: small ones too"},
        "days": {"type": "integer", "description": "at most 9", "default": 1},
    }
    assert read_docstring(docstring)[1]["days"] == "how many"


def test_a_docstring_without_sections_describes_no_arguments() -> None:
    assert read_docstring("Note: this\nis it.\n\nx: not an argument") == ("Note: this is it.", {})
    assert read_docstring("") == ("", {})
    assert "description" not in tool_from_function(make(str))["function"]


@given(st.text(alphabet="aA:- \n*,().", max_size=60))
def test_any_docstring_can_be_read(text: str) -> None:
    read_docstring(text)


def test_pydantic_models_are_read_where_pydantic_is_installed() -> None:
    pydantic = pytest.importorskip("pydantic")
    inner = pydantic.create_model("Inner", n=(int, ...))
    outer = pydantic.create_model("Outer", inner=(inner, ...), name=(str, "x"))
    parameters = tool_from_function(make(outer))["function"]["parameters"]
    check_schema(parameters)
    assert parameters["$defs"]["Inner"]["properties"]["n"]["type"] == "integer"
    assert read_as(outer, {"inner": {"n": 3}}).inner.n == 3
    with pytest.raises(OptionError, match="x is no Outer"):
        read_as(outer, {"inner": {"n": "many"}})
    described = Annotated[int, pydantic.Field(description="some")]
    assert schema_of(described) == {"type": "integer", "description": "some"}


def test_pydantic_models_may_have_parts_of_the_same_name() -> None:
    pydantic = pytest.importorskip("pydantic")
    parts = [pydantic.create_model("Part", **{key: (kind, ...)}) for key, kind in (("n", int), ("text", str))]
    first, second = (pydantic.create_model("Whole", part=(part, ...)) for part in parts)

    def function(a: Any, b: Any, c: Any) -> None:
        """Take three."""

    function.__annotations__ |= {"a": first, "b": second, "c": first}
    parameters = tool_from_function(function)["function"]["parameters"]
    check_schema(parameters)
    call = partial(checked_arguments, "function", (), schemas=tool_schemas([tool_from_function(function)]))
    right = {"a": {"part": {"n": 1}}, "b": {"part": {"text": "x"}}, "c": {"part": {"n": 2}}}
    assert call(right) == right
    assert not isinstance(call({**right, "b": {"part": {"n": 1}}}), dict)
    assert len(parameters["$defs"]) == 2


def test_the_default_of_an_enum_is_one_of_its_options() -> None:
    class Size(enum.Enum):
        SMALL = (1, 2)
        LARGE = (3, 4)

    def function(size: Size = Size.LARGE) -> None:
        """Take a size."""

    function.__annotations__["size"] = Size
    schema = tool_from_function(function)["function"]["parameters"]["properties"]["size"]
    assert (schema["default"], schema["enum"]) == ("LARGE", ["SMALL", "LARGE"])


def test_the_decorator_marks_what_changes_something_and_leaves_the_function_callable() -> None:
    @tool
    def look(where: str) -> str:
        return where.upper()

    @tool(changes=True)
    def write(where: str) -> None: ...

    assert (look.name, look.changes_something, look("a")) == ("look", False, "A")
    assert (write.name, write.changes_something) == ("write", True)
    assert look.call({"where": "b"}) == "B"
    assert write.call({"where": "b"}) == "null"


def test_missing_and_unknown_arguments_are_refused_by_name() -> None:
    one = FunctionTool.from_function(make(str))
    with pytest.raises(OptionError, match="function: arguments lack 'x', expected x; give it"):
        one.call({})
    with pytest.raises(OptionError, match="function: arguments hold 'y', expected only x"):
        one.call({"x": "a", "y": 1})
    with pytest.raises(OptionError, match="arguments is 'x', expected an object"):
        one.call("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("é", "é"),
        (Unit.CELSIUS, '"celsius"'),
        ({"a": [1, None, "é"]}, '{"a": [1, null, "é"]}'),
        (Place("Nice"), '{"city": "Nice", "country": "FR", "tags": []}'),
        ([datetime.date(2025, 1, 2), Path("a"), {2, 1}], '["2025-01-02", "a", [1, 2]]'),
        (float("nan"), "nan"),
        (complex(1, 2), "(1+2j)"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("caf\udce9.txt", "caf\\udce9.txt"),
        (["caf\udce9.txt"], '["caf\\udce9.txt"]'),
    ],
)
def test_a_result_is_text_json_or_repr(result: Any, text: str) -> None:
    assert FunctionTool.from_function(lambda_named(result)).call({}) == text


def lambda_named(result: Any) -> Callable[[], Any]:
    def function() -> Any:
        return result

    return function


def test_an_async_function_is_run_by_call_and_awaited_by_acall() -> None:
    async def double(n: int) -> int:
        await asyncio.sleep(0)
        return 2 * n

    one = FunctionTool.from_function(double)
    assert one.call({"n": 2}) == "4"
    assert asyncio.run(one.acall({"n": 3})) == "6"
    assert asyncio.run(FunctionTool.from_function(make(int)).acall({"x": 4})) == "4"

    def start_double(n: int) -> Awaitable[int]:
        return double(n)

    started = FunctionTool.from_function(start_double)
    assert started.call({"n": 5}) == asyncio.run(started.acall({"n": 5})) == "10"

    async def call_inside_a_loop() -> None:
        one.call({"n": 1})

    with pytest.raises(OptionError, match=r"use `await tool\.acall"):
        asyncio.run(call_inside_a_loop())


SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}


@pytest.mark.parametrize(
    "item",
    [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
        {"name": "f", "description": "d", "parameters": SCHEMA},
        {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA},
        {"name": "f", "title": "F", "description": "d", "inputSchema": SCHEMA, "annotations": {}, "outputSchema": {}},
        {"name": "f", "description": "d", "input_schema": SCHEMA},
        types.SimpleNamespace(name="f", description="d", inputSchema=SCHEMA, outputSchema=None),
        FunctionTool(
            definition={"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}},
            function=print,
        ),
    ],
    ids=["openai", "bare", "responses", "mcp", "anthropic", "object", "function tool"],
)
def test_every_form_of_a_tool_becomes_the_same(item: Any) -> None:
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    assert as_tools([item]) == ({"type": "function", "function": function},)


def test_functions_are_taken_beside_dicts_and_kept_in_order() -> None:
    names = [one["function"]["name"] for one in as_tools([make(str), {"name": "a.b-c"}, {"name": "resolve-id"}])]
    assert names == ["function", "a.b-c", "resolve-id"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\] has the name 'f' of an earlier tool"),
        ([{"name": "two words"}], r"tools\[0\] has the name 'two words'"),
        ([{"name": "f(x)"}], r"tools\[0\] has the name"),
        ([{"description": "d"}], r"tools\[0\] has the name None"),
        ([3], r"tools\[0\] is 3, expected a function or a dict"),
        ([{"function": "f"}], r"tools\[0\] is"),
        ([{"type": "web_search"}], r"tools\[0\] has the type 'web_search'"),
        ([{"name": "f", "parameters": []}], r"tools\[0\]: parameters is \[\]"),
        ({"name": "f"}, "tools is a dict, expected a list"),
        (make(str), "tools is a function, expected a list"),
    ],
)
def test_what_is_no_tool_is_refused_by_its_index(items: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        as_tools(items)


def test_the_callers_dicts_are_left_alone() -> None:
    given = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    before = json.dumps(given)
    one = as_tools([given])[0]
    one["function"]["parameters"]["properties"]["x"] = {}
    assert json.dumps(given) == before


def test_keys_marked_as_not_required_are_optional() -> None:
    extensions = typing if hasattr(typing, "NotRequired") else pytest.importorskip("typing_extensions")
    kind: Any = TypedDict("kind", {"a": int, "b": extensions.NotRequired[int]})  # type: ignore # noqa: PGH003
    assert schema_of(kind)["required"] == ["a"]
