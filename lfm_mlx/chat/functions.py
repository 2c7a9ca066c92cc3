"""Tools from Python functions: a schema from signature, type hints and docstring, and calls with JSON arguments."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, overload

from lfm_mlx.chat.type_hints import Form, Forms, json_form, read_docstring
from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.item_reader import CALL_NAME
from lfm_mlx.types import Tool


@dataclass(frozen=True, kw_only=True, eq=False)
class FunctionTool:
    """A function together with its description for the model. Make one with `tool`, or from any function.

    Args:
        definition: the tool in OpenAI's form.
        function: what is called; plain or `async`.
        changes_something: whether a call has effects beyond its result, so that it may need a confirmation.
    """

    definition: Tool
    function: Callable[..., Any]
    changes_something: bool = False

    @classmethod
    def from_function(cls, function: Callable[..., Any], *, changes: bool = False) -> FunctionTool:
        """The tool of a function. Raises OptionError as `tool_from_function` does."""
        return cls(definition=tool_from_function(function), function=function, changes_something=changes)

    @property
    def name(self) -> str:
        """The name by which the model calls it."""
        return str(self.definition["function"]["name"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def call(self, arguments: Mapping[str, Any]) -> str:
        """The function's result, as the text of a tool message; an `async` function is run to its end.

        A string is itself; all else is JSON, or Python's `repr` where it has no JSON form.

        Args:
            arguments: JSON values by name; they become what the type hints say, such as enums, dates, dataclasses.

        Raises:
            OptionError: an argument is missing, unknown or does not fit its type hint.
        """
        values = self._read_arguments(arguments)
        if inspect.iscoroutinefunction(self.function) and _is_loop_running():
            raise OptionError(f"{self.name} is async and an event loop is running here; use `await tool.acall(...)`")
        result = self.function(**values)
        return _result_text(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)

    async def acall(self, arguments: Mapping[str, Any]) -> str:
        """As `call`, for use inside an event loop: `async` functions are awaited, others run in a thread."""
        values = self._read_arguments(arguments)
        if inspect.iscoroutinefunction(self.function):
            return _result_text(await self.function(**values))
        result = await asyncio.to_thread(self.function, **values)
        return _result_text(await result if inspect.isawaitable(result) else result)

    @functools.cached_property
    def _arguments(self) -> Form:
        return Forms().of_function(self.function)

    def _read_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = self._arguments.read(arguments, f"{self.name}: arguments")
        return values


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(*, changes: bool = False) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, changes: bool = False
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a function a tool: `@tool`, or `@tool(changes=True)` for one that changes something."""
    if function is not None:
        return FunctionTool.from_function(function, changes=changes)
    return lambda function: FunctionTool.from_function(function, changes=changes)


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """A function's description in OpenAI's form, from its name, signature, type hints and docstring.

    The first paragraph of the docstring is the description; the descriptions of arguments are read in Google's,
    NumPy's and Sphinx' style, or from `Annotated[T, "text"]`. A parameter without type hint takes any JSON value.

    Raises:
        OptionError: a type hint has no JSON form, or not every parameter can be given by name.
    """
    name = getattr(function, "__name__", None)
    if not callable(function) or not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise OptionError(f"{function!r:.80} has no name to call it by, expected a function; write one with `def`")
    summary, descriptions = read_docstring(inspect.getdoc(function) or "")
    description = {"description": summary} if summary else {}
    parameters = Forms().of_function(function, descriptions).schema
    return {"type": "function", "function": {"name": name, **description, "parameters": parameters}}


def as_tools(items: Iterable[object]) -> tuple[Tool, ...]:
    """Tools in OpenAI's form, whatever they were given as.

    Args:
        items: functions, `FunctionTool`s, dicts in OpenAI's form, bare dicts with a name, MCP definitions (dicts or
            objects with `inputSchema`).

    Raises:
        OptionError: an item is none of these, has a name that cannot be called, or two have the same name.
    """
    if isinstance(items, (str, Mapping)) or not isinstance(items, Iterable):
        raise OptionError(f"tools is a {type(items).__name__}, expected a list; put a single tool into a list")
    tools: dict[str, Tool] = {}
    for index, item in enumerate(items):
        one = _as_tool(item, f"tools[{index}]")
        name = one["function"]["name"]
        if name in tools:
            raise OptionError(f"tools[{index}] has the name {name!r} of an earlier tool, expected another; rename one")
        tools[name] = one
    return tuple(tools.values())


def _as_tool(item: Any, place: str) -> Tool:
    if isinstance(item, FunctionTool):
        return item.definition
    if not isinstance(item, Mapping) and isinstance(getattr(item, "name", None), str):
        keys = ("name", "description", "inputSchema", "input_schema")
        item = {key: getattr(item, key) for key in keys if getattr(item, key, None) is not None}
    elif not isinstance(item, Mapping) and callable(item):
        return tool_from_function(item)
    if not isinstance(item, Mapping) or not isinstance(item.get("function", item), Mapping):
        raise OptionError(f"{place} is {item!r:.80}, expected a function or a dict with name and parameters")
    if item.get("type", "function") != "function":
        raise OptionError(f"{place} has the type {item['type']!r}, expected 'function'; other tools cannot be called")
    given = item.get("function", item)
    # MCP definitions carry more (annotations, outputSchema, ...) that is not for the model.
    function = {
        key: given[key] for key in ("name", "description", "parameters", "strict") if given.get(key) is not None
    }
    schema = next((given[key] for key in ("inputSchema", "input_schema") if given.get(key) is not None), None)
    if schema is not None:
        function.setdefault("parameters", schema)
    name = function.get("name")
    if not isinstance(name, str) or not CALL_NAME.fullmatch(name):
        raise OptionError(f"{place} has the name {name!r}, expected letters, digits and _ . - / ; rename it")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise OptionError(
            f"{place}: parameters is {function['parameters']!r:.80}, expected the JSON schema of an object"
        )
    return {"type": "function", "function": copy.deepcopy(function)}


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _result_text(result: Any) -> str:
    if isinstance(result, str):
        return unicode_text(str.__str__(result))
    try:
        return unicode_text(json.dumps(result, ensure_ascii=False, allow_nan=False, default=json_form))
    except (TypeError, ValueError, RecursionError):
        return unicode_text(repr(result))


def unicode_text(text: str) -> str:
    """The text with an escape for each half of a surrogate pair, as Python has them in names of files."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
