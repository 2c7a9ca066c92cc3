"""Either calls of tools or text of a form: what an answer is that has tools to use and a schema to fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lfm_mlx.constrain.constraint import Constraint, ToolCalls
from lfm_mlx.constrain.grammar_tokenizer import GrammarTokenizer
from lfm_mlx.errors import OptionError


@dataclass(frozen=True)
class CallsOrForm(Constraint):
    """One block of calls and nothing else, or text of another constraint; the model chooses with its first token.

    Args:
        calls: of tools, its tool_choice "required" or a tool's name.
        form: of the text.

    Raises:
        OptionError: `calls` leaves room for free text, or `form` does.
    """

    calls: ToolCalls
    form: Constraint

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, part in (("calls", self.calls), ("form", self.form)):
            if part.is_lazy:
                raise OptionError(f"{name} allows free text, expected a constraint of all that is written")

    @property
    def allows_blank_lines(self) -> bool:
        return True

    def grammar(self, tokenizer: GrammarTokenizer) -> str:
        start, _, rules = self.calls.grammar(tokenizer).partition("\n")
        block = start.removeprefix("start:").strip()
        opening = {"lark_grammar": f"start: call_block | @form\ncall_block: {block}\n{rules}"}
        return json.dumps({"grammars": [opening, {**self._form_grammar(tokenizer), "name": "form"}]})

    def _form_grammar(self, tokenizer: GrammarTokenizer) -> dict[str, Any]:
        text = self.form.grammar(tokenizer)
        if not text.startswith("{"):
            return {"lark_grammar": text}
        (grammar,) = json.loads(text)["grammars"]
        return dict(grammar)
