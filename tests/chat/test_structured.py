"""Answers that have to fit a schema, and the values that come of them."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import scripted_model

from lfm_mlx import Chat, load
from lfm_mlx.chat.structured import StructuredAnswer
from lfm_mlx.errors import OptionError
from lfm_mlx.types import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}, "is_big": {"type": "boolean"}},
    "required": ["city", "is_big"],
    "additionalProperties": False,
}


class City(pydantic.BaseModel):
    """A place."""

    city: str = pydantic.Field(max_length=10)
    is_big: bool


def chat(**options: Any) -> Chat:
    return scripted_model.chat(sampling=SamplingParams(temperature=1.0, seed=2), **options)


@pytest.mark.parametrize("schema", [SCHEMA, City])
def test_a_schema_gives_a_value_of_its_kind(schema: Any) -> None:
    reply = chat(max_tokens=200, thinking_budget=4).send("A city", schema=schema)
    assert reply.finish_reason == "stop"
    assert StructuredAnswer.of(schema).read(reply.content) == reply.parsed  # type: ignore[union-attr]
    if schema is City:
        assert isinstance(reply.parsed, City)
    else:
        assert set(reply.parsed) == {"city", "is_big"}


def test_an_answer_cut_by_max_tokens_has_no_value() -> None:
    reply = chat(max_tokens=5).send("A city", schema=SCHEMA)
    assert (reply.finish_reason, reply.parsed) == ("length", None)


def test_the_next_answer_is_free_again() -> None:
    talk = chat(max_tokens=60, thinking_budget=4)
    assert isinstance(talk.send("A city", schema={"enum": ["x"]}).parsed, str)
    reply = talk.send("And now?")
    assert reply.parsed is None
    assert reply.content != '"x"'


class Trip(pydantic.BaseModel):
    """Models within models, and one that takes anything."""

    class Anything(pydantic.BaseModel, extra="allow"):
        """Open."""

        name: str

    start: City
    stops: list[City] = []
    rest: Anything | None = None


def test_a_pydantic_model_gets_no_properties_that_it_would_drop() -> None:
    structured = StructuredAnswer.of(Trip)
    assert structured is not None
    schema: Any = structured.constraint.schema  # type: ignore[attr-defined]
    assert schema["additionalProperties"] is schema["$defs"]["City"]["additionalProperties"] is False
    assert schema["$defs"]["Anything"]["additionalProperties"] is True
    assert schema["properties"]["stops"]["default"] == []
    assert "additionalProperties" not in Trip.model_json_schema()


@pytest.mark.parametrize("schema", [5, "object", int, City(city="a", is_big=True), [SCHEMA]])
def test_what_is_no_schema_is_refused(schema: object) -> None:
    with pytest.raises(OptionError, match="schema is a"):
        StructuredAnswer.of(schema)


def test_a_schema_that_cannot_be_enforced_is_refused_and_the_messages_stay() -> None:
    talk = chat()
    with pytest.raises(OptionError, match="not"):
        talk.send("A city", schema={"type": "object", "not": {"required": ["a"]}})
    assert talk.messages == []
    assert StructuredAnswer.of(None) is None


@pytest.mark.skipif(not (scripted_model.TINY / "model.safetensors").exists(), reason="examples/tiny has no weights")
def test_the_tiny_model_fills_a_schema() -> None:
    talk = Chat(*load(scripted_model.TINY), max_tokens=200, thinking_budget=10, sampling=SamplingParams())
    reply = talk.send("Oslo is a big city.", schema=City)
    assert reply.finish_reason == "stop"
    assert isinstance(reply.parsed, City)
    assert reply.reasoning is None or len(reply.reasoning) < 200
