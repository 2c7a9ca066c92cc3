"""One answer of the model: a prompt and rules in, typed events out. The seam that chat, server and terminal share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lfm_mlx.cache import Transcript
from lfm_mlx.chat.messages import RenderedPrompt
from lfm_mlx.chat.reply import Usage
from lfm_mlx.constrain import Constraint, Matcher, ToolCalls, grammar_tokenizer
from lfm_mlx.engine import Engine, Request, Row
from lfm_mlx.engine.control import Control, ReasoningTokens
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import room_for_answer
from lfm_mlx.model import Model
from lfm_mlx.parsing import OutputStream, ParsedOutput, StopStrings, collect
from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.tokenizer import Tokenizer, special
from lfm_mlx.types import ContentDelta, FinishReason, OutputEvent, SamplingParams, Tool, check_integer


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How an answer is generated.

    Args:
        sampling: how tokens are drawn; None takes the values of the model's card.
        max_tokens: most tokens, reasoning included; None allows what context and memory hold.
        stop: strings that end the answer's content; reasoning is not searched.
        constraint: what the answer must be; None leaves it to the model.
        thinking_budget: most tokens of reasoning; None sets no limit.
        guards_loops: whether an answer that goes round in circles is ended.
    """

    sampling: SamplingParams | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    constraint: Constraint | None = None
    thinking_budget: int | None = None
    guards_loops: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, minimum=1)
        if self.thinking_budget is not None:
            check_integer("thinking_budget", self.thinking_budget, minimum=0)
        StopStrings(self.stop)


class Answer(Iterator[OutputEvent]):
    """Iterate for events; afterwards `output`, `usage` and `finish_reason` say what it came to.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: from `lfm_mlx.chat.messages.render_prompt`.
        tools: the tools the model was shown: calls are checked against them.
        options: how to generate.
        transcript: earlier tokens to continue from; it holds all tokens afterwards.

    Raises:
        OptionError: an option does not fit the model.
        ContextLengthError: the prompt leaves no room.
        MemoryPlanError: prompt and answer need more memory than is free.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        prompt: RenderedPrompt,
        *,
        tools: Sequence[Tool] = (),
        options: AnswerOptions | None = None,
        transcript: Transcript | None = None,
    ) -> None:
        options = options or AnswerOptions()
        self._prompt = prompt
        self._stops = StopStrings(options.stop)
        self._detokenizer = tokenizer.detokenizer()
        self._output = OutputStream(tools or None, in_reasoning=prompt.opens_reasoning)
        self._control = make_control(model, tokenizer, prompt, options)
        self._engine = Engine(model)
        self._row = self._engine.submit(
            Request(
                prompt=model.checked_prompt(prompt.ids),
                sampling=options.sampling or model.sampling,
                max_tokens=room_for_answer(model, len(prompt.ids), options.max_tokens, kv_bits=model.kv_bits),
                stop_ids=tokenizer.stop_ids,
                control=self._control,
                transcript=transcript,
                border_ids=_ids_of(tokenizer, special.TURN_START, special.THINK_START),
                call_ids=_ids_of(tokenizer, special.TOOL_CALL_START),
            )
        )
        self._written: list[OutputEvent] = []
        self._num_taken = 0
        self._finish_reason: FinishReason | None = None
        self._events = self._run()

    def __next__(self) -> OutputEvent:
        event = next(self._events)
        self._written.append(event)
        return event

    def cancel(self) -> None:
        """End the answer after the step that is being computed; may be called from any thread."""
        self._row.cancel()

    @property
    def row(self) -> Row:
        """The engine's view of this answer."""
        return self._row

    @property
    def output(self) -> ParsedOutput:
        """What was written so far."""
        opened = self._prompt.opens_reasoning
        return collect(self._written, in_reasoning=opened, is_open=self._output.is_reasoning)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it goes on."""
        return self._finish_reason

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended inside a structure that it was to have."""
        return self._control.is_cut

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self._prompt.ids),
            cached_tokens=self._row.cached_tokens,
            completion_tokens=len(self._row.generated),
            reasoning_tokens=self._control.num_reasoning_tokens,
        )

    def _run(self) -> Iterator[OutputEvent]:
        while self._finish_reason is None:
            if self._num_taken == len(self._row.generated) and self._row.finish_reason is None:
                self._engine.step()
            yield from self._take_tokens()
            if self._num_taken == len(self._row.generated):
                self._finish_reason = self._finish_reason or self._row.finish_reason
        yield from self._passed(self._output.feed(self._detokenizer.finish()))
        yield from self._passed(self._output.finish())
        if rest := self._stops.finish():
            yield ContentDelta(text=rest)

    def _take_tokens(self) -> Iterator[OutputEvent]:
        row = self._row
        while self._num_taken < len(row.generated) and self._finish_reason is None:
            token_id = row.generated[self._num_taken]
            self._num_taken += 1
            is_end = row.finish_reason == "stop" and self._num_taken == len(row.generated)
            if not (is_end and token_id in row.request.stop_ids):
                yield from self._passed(self._output.feed(self._detokenizer.add(token_id), token_id))
            if self._stops.is_found:
                row.cancel()
                self._engine.step()  # Lets the row leave, so that its transcript is complete.
                self._finish_reason = "stop"

    def _passed(self, events: Sequence[OutputEvent]) -> Iterator[OutputEvent]:
        """Events with the content searched for stop strings; what follows one is dropped."""
        for event in events:
            if self._stops.is_found:
                return
            if not isinstance(event, ContentDelta):
                if held := self._stops.finish():
                    yield ContentDelta(text=held)
                yield event
            elif text := self._stops.add(event.text):
                yield ContentDelta(text=text)


def make_control(model: Model, tokenizer: Tokenizer, prompt: RenderedPrompt, options: AnswerOptions) -> Control:
    """The rules of one answer as the engine follows them.

    Raises:
        OptionError: the model cannot keep them: it has no markers for reasoning or calls.
    """
    reasoning = reasoning_tokens(tokenizer)
    if options.thinking_budget is not None and reasoning is None:
        raise OptionError(
            "thinking_budget was given, but this model's vocabulary has no <think> and </think>; leave it out"
        )
    matcher = None
    if options.constraint is not None:
        vocabulary = grammar_tokenizer(tokenizer, model.config.vocab_size)
        matcher = Matcher(options.constraint, vocabulary, is_in_reasoning=prompt.opens_reasoning)
    return Control(
        matcher=matcher,
        reasoning=reasoning,
        is_in_reasoning=prompt.opens_reasoning,
        thinking_budget=options.thinking_budget,
        guard=LoopGuard() if options.guards_loops else None,
    )


def reasoning_tokens(tokenizer: Tokenizer) -> ReasoningTokens | None:
    """The ids that open and close reasoning, or None where they are no single tokens."""
    open_id, close_id = tokenizer.token_id(special.THINK_START), tokenizer.token_id(special.THINK_END)
    if open_id is None or close_id is None:
        return None
    return ReasoningTokens(open_id=open_id, close_id=close_id)


def _ids_of(tokenizer: Tokenizer, *markers: str) -> frozenset[int]:
    """The ids of those markers that the vocabulary has."""
    ids = (tokenizer.token_id(marker) for marker in markers)
    return frozenset(token_id for token_id in ids if token_id is not None)


def calls_constraint(tools: Sequence[Tool], tool_choice: str, *, is_parallel: bool = True) -> ToolCalls | None:
    """The constraint for a choice of tools; None where there is nothing to enforce.

    Raises:
        OptionError: `tool_choice` names no tool, or a tool's schema cannot be enforced.
    """
    if not tools and tool_choice in ("auto", "none"):
        return None
    return ToolCalls(tools, tool_choice=tool_choice, is_parallel=is_parallel)
