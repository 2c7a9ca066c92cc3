"""Text, messages or ids -> checked prompt ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm_mlx.errors import OptionError
from lfm_mlx.model import Model
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import Message, Tool

Prompt = str | Sequence[int] | Sequence[Message]
"""A user's text, token ids, or chat messages."""


def prompt_ids(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    system: str | None = None,
    tools: Sequence[Tool] | None = None,
    raw: bool = False,
    template_variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids that a prompt stands for.

    Args:
        model: its vocabulary and context bound the ids.
        tokenizer: gives the ids and renders messages.
        prompt: text is one user message, put through the chat template where the checkpoint has one; ids are taken as
            they are; messages go through the template.
        system: a system message in front.
        tools: tools the template lists.
        raw: take text as it is, without template.
        template_variables: further variables of the template.

    Raises:
        OptionError: the prompt is empty, of another type, has ids outside the vocabulary, or an option does not fit it.
        ContextLengthError: there is no room left for an answer.
        TemplateError: the messages cannot be rendered.
    """
    return model.checked_prompt(_to_ids(tokenizer, prompt, system, tools, raw, template_variables or {}))


def _to_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    system: str | None,
    tools: Sequence[Tool] | None,
    raw: bool,
    variables: Mapping[str, Any],
) -> list[int]:
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise OptionError(f"prompt is a {type(prompt).__name__}, expected text, a list of ids or a list of messages")
    if isinstance(prompt, str) and (raw or not (tokenizer.has_template or system or tools)):
        _refuse_with_raw(system=system, tools=tools, template_variables=variables)
        return tokenizer.encode(prompt)
    if not prompt:
        return []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        _refuse_with_raw(system=system, tools=tools, template_variables=variables)
        return [int(item) for item in prompt]  # type: ignore[arg-type]
    if raw:
        raise OptionError(
            "raw was given with messages, expected text or ids; leave raw out, a template renders messages"
        )
    messages: list[Any] = list(prompt)
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.apply_template(messages, tools=tools, **variables)


def _refuse_with_raw(**given: object) -> None:
    """Options that only a template can honour are refused where there is none."""
    for name, value in given.items():
        if value:
            raise OptionError(
                f"{name} was given with a prompt that takes no template; give messages, or leave {name} out"
            )
