"""The declarations of fields: what they take, what they say, and the schema that says the same."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from lfm_mlx.server.app import ENDPOINTS
from lfm_mlx.server.field_types import (
    AnyObject,
    Either,
    Fields,
    FieldType,
    Flag,
    ListOf,
    Number,
    OneOf,
    Refused,
    Tagged,
    Text,
    whole,
)
from lfm_mlx.server.http_errors import ApiError

VALUES = [
    None,
    True,
    0,
    5,
    -1,
    0.5,
    5.0,
    "",
    "x",
    "xyz",
    [],
    ["x"],
    ["x", 5],
    {},
    {"a": 5},
    {"t": "x"},
    {"t": "y", "b": 1},
]

TYPES: dict[str, FieldType] = {
    "text": Text(),
    "short": Text(min_len=1, max_len=2),
    "number": Number(0, 1),
    "above": Number(above=0),
    "whole": whole(0, 5),
    "flag": Flag(),
    "one": OneOf("x", False),
    "refused": Refused("leave it out"),
    "object": AnyObject(),
    "numbers": AnyObject(Number()),
    "list": ListOf(Text(min_len=1)),
    "bounded": ListOf(Text(), min_len=1, max_len=1),
    "fields": Fields({"a": whole(0)}, required=["a"]),
    "optional": Fields({"a": whole(0), "t": Text()}),
    "either": Either(Text(), ListOf(Text())),
    "tagged": Tagged("t", {"x": Fields({"t": Text()}), "y": Fields({"t": Text(), "b": whole()}, required=["b"])}),
}


def refusal(field: FieldType, value: Any) -> ApiError | None:
    """Why a value is not taken."""
    try:
        field.read(value, "place")
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize("name", TYPES)
def test_what_is_taken_is_what_the_schema_allows(name: str) -> None:
    field = TYPES[name]
    schema = field.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    num_taken = 0
    for value in VALUES:
        error = refusal(field, value)
        is_taken = error is None
        if error is not None:
            assert error.status == 400
            assert (error.param or "").startswith("place")
            assert "expected" in str(error) or "did you mean" in str(error)
        num_taken += is_taken
        # null is how a field that is refused is left out; Fields drops it before it is read.
        assert is_taken == validator.is_valid(value) or (name == "refused" and value is None), value
    assert 0 < num_taken < len(VALUES) or name == "refused"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": "x"}, "place.a is the string 'x', expected a whole number, at least 0"),
        ({}, "place.a is missing, expected a whole number, at least 0"),
        ({"a": None}, "place.a is missing"),
        ([], "place is a list of 0, expected an object with a"),
        ({"a": 1, "as": 1}, "place.as is no field that this server honours; did you mean a?"),
        ({"a": 1, "zzz": 1}, "place.zzz is no field that this server honours; expected only a; leave it out"),
    ],
)
def test_a_message_says_where_what_and_what_instead(value: Any, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        TYPES["fields"].read(value, "place")
    assert str(caught.value).startswith(message)


def test_every_endpoint_with_a_body_describes_it() -> None:
    described = [one for one in ENDPOINTS if one.method == "POST"]
    assert all(one.fields is not None for one in described)
    for one in described:
        assert one.fields is not None
        jsonschema.Draft202012Validator.check_schema(one.fields.schema())
