"""What any interface asks of the model, and how it becomes a prompt with rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lfm_mlx.chat import AnswerOptions, RenderedPrompt, as_tools, render_prompt
from lfm_mlx.chat.answer import calls_constraint, reasoning_tokens
from lfm_mlx.constrain import CallsOrForm, Constraint, ToolCalls
from lfm_mlx.model import Model
from lfm_mlx.server.http_errors import ApiError
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import Message, SamplingParams, Tool

NEVER = -10_000.0
"""Added to a logit, leaves its token without a chance."""

_NO_VARIABLES = ("tools", "add_generation_prompt", "messages", "tokenizer", "self")
"""What else rendering takes, by the names of its parameters."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to the model.

    Args:
        messages: in OpenAI's form; none where there is a `prompt`.
        prompt: a text or token ids that go on as they are, all that is written being content.
        tools: in OpenAI's form.
        tool_choice: "auto", "none", "required" or a tool's name.
        is_parallel: whether an answer may hold several calls.
        form: what the answer must be, where it is no call.
        sampling: fields of `SamplingParams` that differ from the model card's.
        max_tokens: most tokens of an answer, reasoning included.
        stop: strings that end an answer.
        guards_loops: whether an answer that goes round in circles is ended.
        ignores_eos: whether the tokens with which the model ends an answer are never drawn.
        thinking_budget: most tokens of reasoning; None sets no limit.
        variables: further variables of the chat template.
        top_logprobs: how many of the likeliest tokens to report beside each token's own; None reports nothing.
        num_answers: how many answers to write.
    """

    messages: Sequence[Message] = ()
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Tool] = ()
    tool_choice: str = "auto"
    is_parallel: bool = True
    form: Constraint | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    guards_loops: bool = True
    ignores_eos: bool = False
    thinking_budget: int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    top_logprobs: int | None = None
    num_answers: int = 1


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question, ready for the engine."""

    prompt: RenderedPrompt
    tools: Sequence[Tool]
    sampling: SamplingParams
    options: Sequence[AnswerOptions]
    """One for each answer."""
    is_raw: bool
    """Whether all that is written is content."""


def prepare(model: Model, tokenizer: Tokenizer, ask: Ask) -> Prepared:
    """Render the prompt, compile the grammars, check the options: what needs no engine.

    Raises:
        LfmError: the question cannot be asked.
    """
    tools = as_tools(ask.tools)
    if ask.prompt is not None and not isinstance(ask.prompt, str):
        model.checked_prompt(ask.prompt)
    prompt = _prompt(tokenizer, ask, tools, model.max_context)
    model.checked_prompt(prompt.ids)
    # A model without markers for reasoning keeps within any budget.
    can_reason = reasoning_tokens(tokenizer) is not None
    sampling = replace(model.sampling, **ask.sampling)
    if ask.ignores_eos:
        never = {token_id: NEVER for token_id in tokenizer.stop_ids if token_id < model.config.vocab_size}
        sampling = replace(sampling, logit_bias={**(sampling.logit_bias or {}), **never})
    options = [
        AnswerOptions(
            sampling=own,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
            guards_loops=ask.guards_loops,
            constraint=_constraint(ask, tools),
            thinking_budget=ask.thinking_budget if can_reason else None,
            top_logprobs=ask.top_logprobs,
        )
        for own in spread_seeds(sampling, ask.num_answers)
    ]
    return Prepared(prompt=prompt, tools=tools, sampling=sampling, options=options, is_raw=ask.prompt is not None)


def check_variables(variables: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuse variables of the chat template that have other fields, or that it does not read.

    Raises:
        ApiError: one was given.
    """
    known = sorted(tokenizer.template_variables.difference(_NO_VARIABLES))
    for name in variables:
        if name not in known:
            raise ApiError(
                f"chat_template_kwargs.{name[:80]} was given, expected variables that this model's template reads "
                f"({', '.join(known) or 'none'}); leave it out",
                param=f"chat_template_kwargs.{name[:80]}",
                code="unknown_field",
            )


def _prompt(tokenizer: Tokenizer, ask: Ask, tools: Sequence[Tool], max_tokens: int) -> RenderedPrompt:
    if ask.prompt is None:
        check_variables(ask.variables, tokenizer)
        return render_prompt(tokenizer, ask.messages, tools=tools or None, max_tokens=max_tokens, **ask.variables)
    if isinstance(ask.prompt, str):
        tokenizer.check_length(ask.prompt, max_tokens)
        return RenderedPrompt(text=ask.prompt, ids=tuple(tokenizer.encode(ask.prompt)), opens_reasoning=False)
    return RenderedPrompt(text=tokenizer.decode(ask.prompt), ids=tuple(ask.prompt), opens_reasoning=False)


def spread_seeds(sampling: SamplingParams, num_answers: int) -> list[SamplingParams]:
    """The sampling of each of several answers to one question: with a seed, each has the next one."""
    seed = sampling.seed
    if seed is None:
        return [sampling] * num_answers
    return [replace(sampling, seed=(seed + number) % 2**64) for number in range(num_answers)]


def _constraint(ask: Ask, tools: Sequence[Tool]) -> Constraint | None:
    """What holds for an answer: its calls, its form, or, where it may be either, both."""
    is_free = ask.tool_choice in ("auto", "none")
    if ask.form is None or not is_free:
        return calls_constraint(tools, ask.tool_choice, is_parallel=ask.is_parallel)
    if ask.tool_choice == "none" or not tools:
        return ask.form
    return CallsOrForm(ToolCalls(tools, tool_choice="required", is_parallel=ask.is_parallel), ask.form)
