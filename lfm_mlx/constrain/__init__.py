"""JSON schema, regex, choices, grammars and tool calls to masks over the vocabulary, on llguidance."""

from lfm_mlx.constrain.calls_or_form import CallsOrForm
from lfm_mlx.constrain.constraint import (
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    Lark,
    Reasoning,
    Regex,
    ToolCalls,
)
from lfm_mlx.constrain.grammar_tokenizer import GrammarTokenizer, Mask, grammar_tokenizer
from lfm_mlx.constrain.matcher import Matcher

__all__ = [
    "CallsOrForm",
    "Choice",
    "Constraint",
    "GrammarTokenizer",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "Mask",
    "Matcher",
    "Reasoning",
    "Regex",
    "ToolCalls",
    "grammar_tokenizer",
]
