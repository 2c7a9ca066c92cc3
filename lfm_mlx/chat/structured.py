"""An answer that has to fit a schema: the constraint before it is written, and the value after."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lfm_mlx.constrain import Constraint, JsonSchema
from lfm_mlx.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class StructuredAnswer:
    """What `Chat.send(schema=...)` asks for.

    Args:
        constraint: holds the model to the schema.
        read: turns the answer's text into the value.
    """

    constraint: Constraint
    read: Callable[[str], Any]

    @classmethod
    def of(cls, schema: object) -> StructuredAnswer | None:
        """The structured answer for a JSON schema, a pydantic model class, or None.

        Raises:
            OptionError: something else, or a schema that cannot be enforced.
        """
        if schema is None:
            return None
        if isinstance(schema, Mapping):
            return cls(constraint=JsonSchema(schema), read=json.loads)
        describe, validate = getattr(schema, "model_json_schema", None), getattr(schema, "model_validate_json", None)
        if isinstance(schema, type) and callable(describe) and callable(validate):
            return cls(constraint=JsonSchema(_closed(describe())), read=validate)
        raise OptionError(
            f"schema is a {type(schema).__name__}, expected a JSON schema (a dict) or a pydantic model class"
        )


def _closed(schema: Any) -> Any:
    """The schema without properties beyond those named, unless it says that there may be more: pydantic drops them."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    inner = {
        key: value if key in ("default", "const", "enum", "examples") else _closed(value)
        for key, value in schema.items()
    }
    is_open_object = schema.get("type") == "object" and isinstance(schema.get("properties"), Mapping)
    return {"additionalProperties": False, **inner} if is_open_object else inner
