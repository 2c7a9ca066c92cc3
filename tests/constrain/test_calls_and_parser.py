"""What the tool grammar lets through is what the parser of answers reads back, with nothing left over."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import tool_cases
from drawing import answers, read_json, read_pythonic
from tool_cases import TOOLS

from lfm_mlx.constrain import GrammarTokenizer, ToolCalls

call_list = pytest.importorskip("lfm_mlx.parsing.call_list")


@pytest.mark.parametrize("form", ["pythonic", "json"])
def test_the_parser_reads_every_call_that_the_grammar_lets_through(form: Any, vocabulary: GrammarTokenizer) -> None:
    schemas = {tool_cases.name(tool): tool_cases.parameters(tool) for tool in TOOLS}
    constraint = ToolCalls(TOOLS, tool_choice="required", reasoning="forbidden", form=form)
    reader = read_pythonic if form == "pythonic" else read_json
    for answer in answers(constraint, vocabulary, 40, max_tokens=250):
        text = answer.text.removeprefix("<|tool_call_start|>").removesuffix("<|tool_call_end|>")
        calls = call_list.read_call_list(text)
        assert [(call.name, call.arguments) for call in calls] == reader(text)
        for call in calls:
            jsonschema.validate(call.arguments, schemas[call.name])
