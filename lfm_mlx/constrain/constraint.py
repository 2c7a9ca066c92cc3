"""What an answer must be: values that are checked when they are made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from llguidance import LLMatcher, regex_to_lark

from lfm_mlx.constrain.grammar_tokenizer import GrammarTokenizer
from lfm_mlx.constrain.lark_rules import quoted
from lfm_mlx.constrain.lark_source import check_lark
from lfm_mlx.constrain.literal_grammar import Form
from lfm_mlx.constrain.reason import one_line
from lfm_mlx.constrain.schema_check import check_compiles, check_len, check_schema, json_grammar
from lfm_mlx.constrain.schema_tree import Schema
from lfm_mlx.constrain.tool_grammar import ToolDeclaration, calls_grammar, read_tools
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import special
from lfm_mlx.types import Tool

Reasoning = Literal["forbidden", "optional", "required"]
"""Whether `<think>...</think>` comes first. Reasoning is free text, and the answer after it is constrained."""

_REASONING = ("forbidden", "optional", "required")
_FORMS = ("pythonic", "json")
_UNSUPPORTED_OPTION = re.compile(r"^[^\n/#\"]*\[[^\]\n]*\b(stop|max_tokens|temperature)\s*=", re.MULTILINE)


@dataclass(frozen=True)
class Constraint:
    """Base of all constraints. An answer is: reasoning if there may be any, what the constraint says, a stop token.

    Args:
        reasoning: whether the model may, must or must not think first. Where the prompt itself has opened `<think>`,
            "forbidden" closes it at once.
    """

    reasoning: Reasoning = field(default="optional", kw_only=True)

    def __post_init__(self) -> None:
        if self.reasoning not in _REASONING:
            raise OptionError(f"reasoning is {self.reasoning!r}, expected one of {', '.join(_REASONING)}")

    @property
    def is_lazy(self) -> bool:
        """Whether the answer is free text until a tool call begins."""
        return False

    @property
    def allows_blank_lines(self) -> bool:
        """Whether line breaks may stand between `</think>` and the constrained part, as models write them."""
        return False

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        """The grammar of the constrained part, in llguidance's form."""
        raise NotImplementedError


@dataclass(frozen=True)
class JsonSchema(Constraint):
    """JSON text that is valid under a schema; properties come in the schema's order.

    Args:
        schema: a JSON schema. A keyword that cannot be enforced is refused; annotations are ignored.

    Raises:
        OptionError: naming the keyword and its place.
    """

    schema: Schema

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schema(self.schema)
        check_compiles(self.schema)

    @property
    def allows_blank_lines(self) -> bool:
        return True

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        return self._grammar

    @cached_property
    def _grammar(self) -> str:
        return json_grammar(self.schema if isinstance(self.schema, Mapping) else {})


def JsonObject(*, reasoning: Reasoning = "optional") -> JsonSchema:  # noqa: N802 - stands beside JsonSchema
    """Any JSON object."""
    return JsonSchema({"type": "object"}, reasoning=reasoning)


@dataclass(frozen=True)
class Regex(Constraint):
    """Text that a regular expression matches from its first to its last character.

    Args:
        pattern: in the syntax of Rust's `regex` crate: no look-around, no back-references. `\\d` is 0 to 9. Each
            count of `.{20,400}` is another state: a mask then takes milliseconds at 128,000 tokens, with `.*` far less.
    """

    pattern: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text("pattern", self.pattern)
        _check_grammar("pattern", self._grammar)

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        return self._grammar

    @property
    def _grammar(self) -> str:
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(self.pattern, 'd')}/")


@dataclass(frozen=True)
class Choice(Constraint):
    """One of several texts.

    Args:
        options: at least one text; none of them empty.
    """

    options: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.options, str) or not self.options:
            raise OptionError(f"options is {self.options!r}, expected a list of at least one text")
        for option in self.options:
            _check_text("an option", option)
        check_len("".join(self.options), "options")

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(quoted, self.options)))


@dataclass(frozen=True)
class Lark(Constraint):
    """Text that a grammar derives.

    Args:
        source: a grammar in llguidance's dialect of Lark, with a rule `start`. Special tokens stand in it as
            `<|im_end|>` and are checked when the matcher is made.
    """

    source: str

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_text("source", self.source)
        option = _UNSUPPORTED_OPTION.search(self.source)
        if option:
            raise OptionError(
                f"source: the rule option {option[1]!r} is not supported, because it changes what was already written "
                "or drawn; use 'suffix' or 'lazy'"
            )
        check_lark(self.source)
        _check_grammar("source", LLMatcher.grammar_from_lark(self.source))

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        return LLMatcher.grammar_from_lark(self.source)


@dataclass(frozen=True)
class ToolCalls(Constraint):
    """Calls of the given tools with arguments that are valid under the tools' schemas.

    Args:
        tools: OpenAI's form, bare function objects, or MCP's form.
        tool_choice: "auto": free text until the model begins a call, and after it; "none": free text without calls;
            "required": one block of calls and nothing else; or a tool's name: "required" with that tool alone.
        is_parallel: whether an answer may hold more than one call.
        form: how calls are written: `[f(a=1)]` or `[{"name": "f", "arguments": {"a": 1}}]`.

    Raises:
        OptionError: naming the tool, and the keyword of its schema where that is the reason.
    """

    tools: Sequence[Tool]
    tool_choice: str = field(default="auto", kw_only=True)
    is_parallel: bool = field(default=True, kw_only=True)
    form: Form = field(default="pythonic", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in _FORMS:
            raise OptionError(f"form is {self.form!r}, expected one of {', '.join(_FORMS)}")
        names = [one.name for one in self.declarations]
        if self.tool_choice not in ("auto", "none", "required", *names):
            known = ", ".join(["auto", "none", "required", *names])
            raise OptionError(f"tool_choice is {self.tool_choice!r}, expected one of {known}")
        if self.tool_choice == "required" and not names:
            raise OptionError("tool_choice is 'required' and there are no tools; give tools or use 'none'")
        if self.allows_calls:
            _ = self._block  # written at once: what cannot be enforced is refused here

    @cached_property
    def declarations(self) -> tuple[ToolDeclaration, ...]:
        """The tools, read."""
        return read_tools(self.tools)

    @property
    def allows_calls(self) -> bool:
        """Whether there may be a call at all."""
        return self.tool_choice != "none" and bool(self.declarations)

    @property
    def allows_blank_lines(self) -> bool:
        return True

    @property
    def is_lazy(self) -> bool:
        return self.tool_choice in ("auto", "none")

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        """The grammar of a block; where calls are required, its opening marker included."""
        start, end = (_marker_token(tokenizer, text) for text in (special.TOOL_CALL_START, special.TOOL_CALL_END))
        return LLMatcher.grammar_from_lark(f"start: {'' if self.is_lazy else start} calls {end}\n{self._block}")

    @cached_property
    def _block(self) -> str:
        chosen = [one for one in self.declarations if self.tool_choice in ("auto", "required", one.name)]
        return calls_grammar(chosen, form=self.form, is_parallel=self.is_parallel)


def _marker_token(tokenizer: GrammarTokenizer, text: str) -> str:
    token_id = tokenizer.marker(text)
    if token_id is None:
        raise OptionError(f"the tokenizer has no token {text}, expected one for tool calls; does the model call tools?")
    return f"<[{token_id}]>"


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise OptionError(f"{name} is {value!r}, expected a text that is not empty")
    check_len(value, name)


def _check_grammar(name: str, grammar: str) -> None:
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise OptionError(f"{name} is refused: {one_line(*messages)}; rewrite what is named there")
