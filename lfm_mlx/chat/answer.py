"""One answer of the model: a prompt and rules in, typed events out. The seam that chat, server and terminal share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from lfm_mlx.cache import Transcript
from lfm_mlx.chat.messages import RenderedPrompt
from lfm_mlx.chat.reader import AnswerReader
from lfm_mlx.chat.reply import Usage
from lfm_mlx.constrain import Constraint, Matcher, ToolCalls, grammar_tokenizer
from lfm_mlx.distributed import free_bytes
from lfm_mlx.engine import Engine, EngineThread, Request, Row, TokenLogprob
from lfm_mlx.engine.control import Control, ReasoningTokens
from lfm_mlx.errors import OptionError
from lfm_mlx.memory import room_for_answer
from lfm_mlx.model import Model
from lfm_mlx.parsing import OutputStream, ParsedOutput, RawStream, StopStrings, collect, merged
from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.tokenizer import Tokenizer, special
from lfm_mlx.types import FinishReason, OutputEvent, SamplingParams, Tool, check_integer, check_number

MERGED_EVENTS = 512
"""Events that an answer keeps at least before it joins those that may be one."""


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
        top_logprobs: how many of the likeliest tokens `Answer.logprobs` has beside each token; None: it has nothing.
        time_limit_s: seconds after which the answer ends, waiting included; None sets no limit.
    """

    sampling: SamplingParams | None = None
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    constraint: Constraint | None = None
    thinking_budget: int | None = None
    guards_loops: bool = True
    top_logprobs: int | None = None
    time_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, minimum=1)
        if self.thinking_budget is not None:
            check_integer("thinking_budget", self.thinking_budget, minimum=0)
        if self.top_logprobs is not None:
            check_integer("top_logprobs", self.top_logprobs, minimum=0)
        if self.time_limit_s is not None:
            check_number("time_limit_s", self.time_limit_s, minimum=0)
        StopStrings(self.stop)


class Answer(Iterator[OutputEvent]):
    """Iterate for events, or `take` those that have come; `output`, `usage` and `finish_reason` say what it came to.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: from `lfm_mlx.chat.messages.render_prompt`.
        tools: the tools the model was shown: calls are checked against them.
        options: how to generate.
        transcript: earlier tokens to continue from; it holds all tokens afterwards. Not with `engine`.
        is_raw: whether all that is written is content: reasoning and calls are not looked for.
        engine: runs the answer among others from now on, in its own thread; None computes it while it is iterated.
        on_progress: called in the engine's thread when there may be something to `take`; it should return at once.

    Raises:
        OptionError: an option does not fit the model, or a transcript was given with an engine.
        ContextLengthError: the prompt leaves no room.
        MemoryPlanError: prompt and answer need more memory than is free.
        QueueFullError: too many requests wait for the engine.
        EngineClosedError: the engine takes no more requests.
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
        is_raw: bool = False,
        engine: EngineThread | None = None,
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        options = options or AnswerOptions()
        self._prompt = prompt
        self._control = make_control(model, tokenizer, prompt, options)
        self._reader = AnswerReader(
            self._control,
            tokenizer.detokenizer(),
            RawStream() if is_raw else OutputStream(tools or None, in_reasoning=prompt.opens_reasoning),
            StopStrings(options.stop),
            tokenizer.stop_ids,
        )
        if engine is not None:
            max_tokens = engine.room_for_answer(len(prompt.ids), options.max_tokens)
        else:
            free = free_bytes(model)
            max_tokens = room_for_answer(
                model, len(prompt.ids), options.max_tokens, kv_bits=model.kv_bits, free_bytes=free
            )
        request = Request(
            prompt=model.checked_prompt(prompt.ids),
            sampling=options.sampling or model.sampling,
            max_tokens=max_tokens,
            stop_ids=tokenizer.stop_ids,
            control=self._reader,
            transcript=transcript,
            border_ids=_ids_of(tokenizer, special.TURN_START, special.THINK_START),
            call_ids=_ids_of(tokenizer, special.TOOL_CALL_START),
            top_logprobs=options.top_logprobs,
            time_limit_s=options.time_limit_s,
        )
        self._engine = Engine(model) if engine is None else None
        self._has_news = threading.Event()
        self._pending: deque[OutputEvent] = deque()
        self._written: list[OutputEvent] = []
        self._merged_at = MERGED_EVENTS
        self._finish_reason: FinishReason | None = None
        if self._engine is not None:
            self._row = self._engine.submit(request)
        else:
            assert engine is not None
            self._row = engine.submit(request, _both(self._has_news.set, on_progress))

    def __next__(self) -> OutputEvent:
        while not self._pending:
            if self._finish_reason is not None:
                if self._row.error is not None:
                    raise self._row.error
                raise StopIteration
            self._go_on()
            self._collect()
        event = self._pending.popleft()
        self._note_written([event])
        return event

    def __del__(self) -> None:
        if hasattr(self, "_row"):
            self._row.cancel()  # Nobody will ever see what it would write.

    def take(self) -> list[OutputEvent]:
        """The events that have come since the last time, without waiting; `finish_reason` says whether these are all.

        An answer that an error ended raises nothing here: its `finish_reason` is "error".
        """
        self._collect()
        events = list(self._pending)
        self._pending.clear()
        self._note_written(events)
        return events

    def cancel(self) -> None:
        """End the answer after the step that is being computed; may be called from any thread."""
        self._row.cancel()

    @property
    def row(self) -> Row:
        """The engine's view of this answer."""
        return self._row

    @property
    def output(self) -> ParsedOutput:
        """What was taken so far."""
        opened = self._prompt.opens_reasoning
        return collect(self._written, in_reasoning=opened, is_open=self._reader.is_reasoning)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended; None while it goes on, or while its last events were not looked at."""
        return self._finish_reason if not self._pending else None

    @property
    def error(self) -> Exception | None:
        """What went wrong, where `finish_reason` is "error"."""
        return self._row.error

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Of the tokens of the answer's text so far, reasoning and calls included, in order.

        A stop token is not among them, nor are tokens behind the place where a stop string begins.
        """
        return self._row.logprobs[: self._reader.num_shown]

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended inside a structure that it was to have."""
        return self._control.is_cut

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended it; None while there is none."""
        return self._reader.stop_string

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=len(self._prompt.ids),
            cached_tokens=self._row.cached_tokens,
            completion_tokens=len(self._row.generated),
            reasoning_tokens=self._control.num_reasoning_tokens,
        )

    def _go_on(self) -> None:
        """Compute a step, or wait for the thread that does."""
        if self._engine is None:
            self._has_news.wait()
            self._has_news.clear()
        elif self._row.finish_reason is None:
            self._engine.step()

    def _note_written(self, events: Iterable[OutputEvent]) -> None:
        self._written += events
        if len(self._written) >= self._merged_at:
            # An event a token would be ten times the size of the text.
            self._written = merged(self._written)
            self._merged_at = len(self._written) + MERGED_EVENTS

    def _collect(self) -> None:
        """Queue the events that have come, and those that were held back until the row ended."""
        finish_reason = self._row.finish_reason  # Looked at first: all events of a row that ended are there.
        self._pending.extend(self._reader.take())
        if finish_reason is not None and self._finish_reason is None:
            self._pending.extend(self._reader.finish())
            self._finish_reason = finish_reason


def _both(first: Callable[[], None], second: Callable[[], None] | None) -> Callable[[], None]:
    if second is None:
        return first

    def call() -> None:
        first()
        second()

    return call


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
