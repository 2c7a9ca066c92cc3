"""A model's chat template: messages and tools to the text of a prompt."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lfm_mlx.errors import CheckpointError, TemplateError
from lfm_mlx.tokenizer import special
from lfm_mlx.types import Message, Tool

# What a template can raise while it renders: jinja's own errors, and Python's where an expression meets a wrong type.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)

# The names a message's reasoning goes by; templates read the first, gpt-oss style ones the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_MAX_DEPTH = 100


class ChatTemplate:
    """A compiled chat template. Its text is what transformers' `apply_chat_template(tokenize=False)` returns.

    Templates come with checkpoints and are not trusted: they run in jinja's sandbox and see plain values only.

    Args:
        source: the jinja template.
        name: where it stands, for messages.
        special_tokens: variables such as `bos_token` that the template may print.

    Raises:
        CheckpointError: the template is empty or no valid jinja.
    """

    def __init__(
        self, source: str, *, name: str = "chat_template.jinja", special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.source = source
        self.name = name
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source, name)

    @property
    def variables(self) -> frozenset[str]:
        """The names that it looks up, `messages` and `bos_token` among them."""
        environment = self._template.environment
        return frozenset(meta.find_undeclared_variables(environment.parse(self.source)))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        **variables: object,
    ) -> str:
        """The prompt for these messages.

        As in transformers, a message's keys whose value is None are dropped, and reasoning given as `thinking` or
        `reasoning` is also offered as `reasoning_content`.

        Args:
            messages: at least one mapping with a string `role`.
            tools: JSON descriptions of the tools.
            add_generation_prompt: whether the text ends where the assistant's answer begins.
            variables: further variables of the template, such as `documents` or `preserve_thinking`.

        Raises:
            TemplateError: the messages or tools are malformed, or the template refuses them.
        """
        chat = [_plain_message(index, message) for index, message in enumerate(_as_list("messages", messages))]
        if not chat:
            raise TemplateError("messages is empty, expected at least one message; add a user message")
        known = {**self._special_tokens, "documents": None}
        values = {key: _plain(f"variable {key}", value) for key, value in variables.items()}
        given = {"messages": chat, "tools": _plain_tools(tools), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(known | values | given)
        except _RENDER_ERRORS as error:
            raise TemplateError(self._explain(error, chat)) from error

    def _explain(self, error: Exception, chat: list[dict[str, Any]]) -> str:
        line, index = _locate(error.__traceback__, chat)
        subject = "the messages" if index is None else f"messages[{index}]"
        place = self.name if line is None else f"{self.name}, line {line}"
        lacks_content = index is not None and "content" not in chat[index]
        advice = "give it a content, '' if need be" if lacks_content else "change the messages to what it expects"
        return f"{subject} cannot be rendered: {error} ({place}); {advice}"


def opens_reasoning(rendered: str) -> bool:
    """Whether a rendered prompt ends inside `<think>`, so that the answer begins with reasoning.

    A `<think>` that a message quotes does not count: its turn is closed after it.
    """
    closers = (special.THINK_END, special.TURN_END, special.TURN_START)
    return rendered.rfind(special.THINK_START) > max(rendered.rfind(closer) for closer in closers)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print_body"), [], [], body).set_lineno(line)

    def _print_body(self, caller: Macro) -> str:
        # A call block, as in transformers, and not the bare body: names set inside must not leak out.
        return str(caller())


class _GuardedNamespace(Namespace):
    """jinja's `namespace`, without names that lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` stays free as a name, as in jinja.
        self, *values = args
        attributes = dict(*values, **kwargs)
        for name in attributes:
            _refuse_internal_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal_name(name)
        super().__setitem__(name, value)


class _DictMaker:
    """`dict` in a template: makes dicts, and is not the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_internal_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no names with an underscore in front, got {name!r}")


def _compile(source: str, name: str) -> jinja2.Template:
    if not source.strip():
        raise CheckpointError(f"{name} is empty, expected a chat template; fetch the file again or remove it")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _DictMaker(),
        "namespace": _GuardedNamespace,
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{name}, line {error.lineno}: {error.message}; expected a jinja chat template; fetch the file again"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested too deeply to be compiled; fetch the file again") from error


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's filter escapes HTML and sorts keys; a prompt wants neither."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _as_list(name: str, value: object) -> Sequence[object]:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
        return value
    raise TemplateError(f"{name} is a {type(value).__name__}, expected a list; put a single one into a list")


def _plain_message(index: int, message: object) -> dict[str, Any]:
    place = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"{place} is a {type(message).__name__}, expected a mapping such as "
            '{"role": "user", "content": "..."}; correct the message'
        )
    if not isinstance(message.get("role"), str):
        raise TemplateError(
            f"{place} has the role {message.get('role')!r}, expected a string such as 'user'; correct the message"
        )
    plain = {key: value for key, value in _plain(place, message).items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain_tools(tools: object) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    for index, tool in enumerate(_as_list("tools", tools)):
        if not isinstance(tool, Mapping):
            raise TemplateError(
                f"tools[{index}] is a {type(tool).__name__}, expected a mapping with name, description and "
                "parameters; describe the tool as JSON"
            )
    return [_plain(f"tools[{index}]", tool) for index, tool in enumerate(_as_list("tools", tools))]


def _plain(place: str, value: Any, depth: int = 0) -> Any:
    """A copy made of JSON's types alone: the methods of richer objects are none of a template's business."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth == _MAX_DEPTH:
        raise TemplateError(f"{place} is nested more than {_MAX_DEPTH} levels deep; flatten the value")
    if isinstance(value, Mapping):
        return {_plain(place, key, depth + 1): _plain(f"{place}[{key!r}]", value[key], depth + 1) for key in value}
    if isinstance(value, (list, tuple)):
        items = [_plain(f"{place}[{index}]", item, depth + 1) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    # Members of enums and numpy's scalars are subclasses with methods of their own.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    raise TemplateError(
        f"{place} is a {type(value).__name__}, expected a JSON value (text, number, list, mapping); convert it first"
    )


def _locate(traceback: TracebackType | None, chat: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    """The line of the template that failed, and the index of the message that a loop or macro held there.

    jinja puts a frame with the template's line and variables into the traceback for each template function.
    """
    index_of = {id(message): index for index, message in enumerate(chat)}
    line = index = None
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
            held = (index_of[id(value)] for value in frame.f_locals.values() if id(value) in index_of)
            index = next(held, index)
        traceback = traceback.tb_next
    return line, index
