"""`Chat`: a conversation that remembers its messages and what the model computed for them."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lfm_mlx.cache import Transcript
from lfm_mlx.chat.answer import Answer, AnswerOptions, calls_constraint
from lfm_mlx.chat.functions import as_tools
from lfm_mlx.chat.messages import render_prompt
from lfm_mlx.chat.reply import ChatEvent, Reply, ToolResult, TurnDone, TurnEnd, Usage
from lfm_mlx.chat.saved_chat import read_messages, write_messages
from lfm_mlx.chat.structured import StructuredAnswer
from lfm_mlx.chat.tool_runner import Confirm, ToolRunner
from lfm_mlx.chat.turns import read_turns
from lfm_mlx.errors import LfmError, OptionError
from lfm_mlx.model import Model
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import SamplingParams, ToolCall, check_integer, check_number

_T = TypeVar("_T")


class Chat:
    """A conversation with a model.

    A turn computes only what is new: what the prompt shares with what was computed before is continued from.

    Args:
        model: from `load`.
        tokenizer: from `load`; it must have a chat template.
        system: system message.
        tools: Python functions, `FunctionTool`s, or tool definitions. Functions are run automatically.
        tool_choice: "auto", "none", "required" or a tool's name, for the first round of each turn.
        parallel_tool_calls: whether an answer may hold several calls.
        executes_tools: whether calls of functions are run; otherwise a turn ends with them.
        max_rounds: most answers of the model in one turn.
        time_limit_s: seconds after which a turn ends; None sets no limit.
        confirm: asked before a tool that changes something runs; None runs it.
        sampling: how tokens are drawn; None takes the model card's values.
        max_tokens: most tokens of one answer.
        thinking_budget: most tokens of reasoning in one answer.
        guards_loops: whether answers that go round in circles are ended.
        template_variables: further variables of the chat template, such as ``enable_thinking``.

    Attributes:
        messages: the conversation in OpenAI's form; it may be edited between turns.

    One chat serves one turn at a time; several chats may share a model, in several threads.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Iterable[object] = (),
        tool_choice: str = "auto",
        parallel_tool_calls: bool = True,
        executes_tools: bool = True,
        max_rounds: int = 8,
        time_limit_s: float | None = None,
        confirm: Confirm | None = None,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        thinking_budget: int | None = None,
        guards_loops: bool = True,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        check_integer("max_rounds", max_rounds, minimum=1)
        if time_limit_s is not None:
            check_number("time_limit_s", time_limit_s, minimum=0)
        self.model = model
        self.tokenizer = tokenizer
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self.options = AnswerOptions(
            sampling=sampling, max_tokens=max_tokens, thinking_budget=thinking_budget, guards_loops=guards_loops
        )
        if isinstance(tools, Iterator):
            tools = list(tools)
        self.tools = as_tools(tools)
        self._constraint = calls_constraint(self.tools, tool_choice, is_parallel=parallel_tool_calls)
        self._later_constraint = calls_constraint(self.tools, "auto", is_parallel=parallel_tool_calls)
        self._runner = ToolRunner(tools, confirm)
        self._executes_tools = executes_tools
        self._max_rounds = max_rounds
        self._time_limit_s = time_limit_s
        self._variables = dict(template_variables or {})
        self._transcript = Transcript(model.new_state())
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._cancelled = threading.Event()  # of the turn that is being written

    def send(self, content: str | None = None, *, schema: object = None) -> Reply:
        """Say something and wait for the reply.

        Args:
            content: the user's message; None lets the model go on from `messages`, such as after tool results.
            schema: a JSON schema or a pydantic model that the answer has to fit; the value is `Reply.parsed`.

        Raises:
            OptionError: an argument is refused, or another turn is being written.
            LfmError: the prompt cannot be rendered or does not fit; `messages` are as before.
            pydantic.ValidationError: a validator of the model refuses what its JSON schema allows; likewise.
        """
        return _reply_of(self.stream(content, schema=schema))

    def stream(self, content: str | None = None, *, schema: object = None) -> Iterator[ChatEvent]:
        """As `send`, event by event; the last one is `TurnDone`. An iterator that is dropped ends the turn."""
        return self._events(content, schema)

    def _events(
        self,
        content: str | None,
        schema: object,
        cancelled: threading.Event | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> Iterator[ChatEvent]:
        if not self._lock.acquire(blocking=False):
            raise OptionError("this chat is writing another turn; wait for its end, or use a second Chat")
        before = list(self.messages)
        try:
            self._runner.begin()
            self._cancelled = cancelled or threading.Event()
            structured = StructuredAnswer.of(schema)
            if content is not None:
                self.messages.append({"role": "user", "content": content})
            yield from self._turn(structured, loop)
        except Exception as error:
            self.messages = before
            if not isinstance(error, LfmError):  # A step that failed halfway leaves no state to continue from.
                self._transcript = Transcript(self.model.new_state())
            raise
        except KeyboardInterrupt:
            self._transcript = Transcript(self.model.new_state())
            raise
        finally:
            self._answer = None
            self._lock.release()

    def cancel(self) -> None:
        """End the turn that is being written; may be called from any thread. What was written is kept."""
        self._cancelled.set()
        self._runner.cancel()
        if (answer := self._answer) is not None:
            answer.cancel()

    def reset(self) -> None:
        """Forget everything but the system messages in front."""
        self.messages = list(
            itertools.takewhile(lambda message: message.get("role") in ("system", "developer"), self.messages)
        )

    def undo(self) -> str | None:
        """Take back the last user message and everything after it; returns its text, None if there is none.

        Raises:
            TemplateError: its content is no text; the messages are as before.
        """
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index].get("role") == "user":
                content = read_turns(self.messages[index : index + 1])[0].content
                del self.messages[index:]
                return content
        return None

    def add_tool_result(self, call: ToolCall, content: str) -> None:
        """Append the result of a call that the caller has run; `send()` then lets the model go on."""
        self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})

    async def asend(self, content: str | None = None, *, schema: object = None) -> Reply:
        """As `send`, in a thread; cancelling the task cancels the turn. `async` tools run in the caller's loop."""
        cancelled = threading.Event()
        events = self._events(content, schema, cancelled, asyncio.get_running_loop())
        return await self._in_thread(cancelled, _reply_of, events)

    async def astream(self, content: str | None = None, *, schema: object = None) -> AsyncIterator[ChatEvent]:
        """As `stream`, for `async for`; leaving the loop cancels the turn. `async` tools run in the caller's loop."""
        cancelled = threading.Event()
        events = self._events(content, schema, cancelled, asyncio.get_running_loop())
        try:
            while (event := await self._in_thread(cancelled, next, events, None)) is not None:
                yield event
        finally:
            cancelled.set()
            await asyncio.to_thread(events.close)  # type: ignore[attr-defined]

    async def _in_thread(self, cancelled: threading.Event, function: Callable[..., _T], *args: object) -> _T:
        """Run a part of a turn; where the task is cancelled, the turn is, and the part comes to its end first."""
        part = asyncio.ensure_future(asyncio.to_thread(function, *args))
        try:
            return await asyncio.shield(part)
        except asyncio.CancelledError:
            cancelled.set()
            if self._cancelled is cancelled:
                self.cancel()
            await asyncio.wait([part])
            part.exception()  # Looked at, or asyncio complains that nobody did.
            raise

    def save(self, path: str | Path) -> None:
        """Write the messages to a JSON file, whole or not at all.

        Raises:
            OptionError: the file cannot be written, or a message has no JSON form.
        """
        write_messages(Path(path), self.messages)

    def load(self, path: str | Path) -> None:
        """Go on from the messages of a file that `save` wrote.

        Raises:
            CheckpointError: the file is missing or is not such a file; the messages are as before.
        """
        self.messages = read_messages(Path(path))

    def _turn(self, structured: StructuredAnswer | None, loop: asyncio.AbstractEventLoop | None) -> Iterator[ChatEvent]:
        """Answers and tool runs until the model has said what it has to say."""
        started_s, usage = time.monotonic(), Usage()
        for round_number in range(self._max_rounds):
            answer = self._new_answer(structured, is_first=round_number == 0)
            try:
                yield from self._within_time(answer, started_s)
            finally:
                self._keep(answer)
            usage = usage + answer.usage
            has_more = self._executes_tools and self._has_more_to_do(answer)
            stopped = self._is_stopped(started_s)
            if not has_more or stopped or round_number == self._max_rounds - 1:
                end = (stopped or "max_rounds") if has_more else self._turn_end(answer)
                yield TurnDone(reply=_reply(answer, usage, end, structured))
                return
            yield from self._run_tools(answer, loop)
            if stopped := self._is_stopped(started_s):
                yield TurnDone(reply=replace(_reply(answer, usage, stopped, None), tool_calls=()))
                return

    def _new_answer(self, structured: StructuredAnswer | None, *, is_first: bool) -> Answer:
        prompt = render_prompt(
            self.tokenizer,
            self.messages,
            tools=self.tools,
            max_tokens=self.model.max_context,
            **self._variables,
        )
        constraint = self._constraint if is_first else self._later_constraint
        options = self.options
        changed: dict[str, Any] = {"constraint": structured.constraint if structured is not None else constraint}
        self._answer = Answer(
            self.model,
            self.tokenizer,
            prompt,
            tools=self.tools,
            options=AnswerOptions(**{**vars(options), **changed}),
            transcript=self._transcript,
        )
        if self._cancelled.is_set():
            self._answer.cancel()
        return self._answer

    def _within_time(self, answer: Answer, started_s: float) -> Iterator[ChatEvent]:
        if self._time_limit_s is None:
            yield from answer
            return
        # Events are no clock: while a prompt is computed or a call is written, there are none.
        timer = threading.Timer(max(0.0, self._time_limit_s - (time.monotonic() - started_s)), answer.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield from answer
        finally:
            timer.cancel()

    def _keep(self, answer: Answer) -> None:
        """Append what was written, unless the answer was given up before its first word."""
        output = answer.output
        is_given_up = answer.finish_reason in (None, "cancelled")
        if not is_given_up or output.content or output.reasoning or output.tool_calls:
            self.messages.append(_assistant_message(answer))

    def _has_more_to_do(self, answer: Answer) -> bool:
        """Whether there are calls that this chat can run, all of them, or mistakes in calls to tell the model."""
        output = answer.output
        has_any = bool(output.tool_calls or output.errors) and self._runner.has_functions
        return has_any and self._runner.can_run(output.tool_calls) and answer.finish_reason == "stop"

    def _run_tools(self, answer: Answer, loop: asyncio.AbstractEventLoop | None) -> Iterator[ToolResult]:
        for call in answer.output.tool_calls:
            if self._cancelled.is_set():
                result = ToolResult(call=call, content="The user stopped before this call was run.", is_error=True)
            else:
                result = self._runner.run(call, loop)
            self.add_tool_result(call, result.content)
            yield result
        for error in answer.output.errors:
            self.messages.append({"role": "tool", "content": f"Error: this call was not run: {error.message}"})

    def _is_stopped(self, started_s: float) -> Literal["cancelled", "time_limit"] | None:
        if self._cancelled.is_set():
            return "cancelled"
        is_late = self._time_limit_s is not None and time.monotonic() - started_s >= self._time_limit_s
        return "time_limit" if is_late else None

    def _turn_end(self, answer: Answer) -> TurnEnd:
        if answer.finish_reason == "cancelled":
            return "cancelled" if self._cancelled.is_set() else "time_limit"
        if answer.output.tool_calls and answer.finish_reason == "stop":
            return "tool_calls"
        assert answer.finish_reason != "error", "an answer raises its error"
        return answer.finish_reason or "stop"


def _reply_of(events: Iterator[ChatEvent]) -> Reply:
    for event in events:
        if isinstance(event, TurnDone):
            return event.reply
    raise AssertionError("a stream ends with TurnDone")


def _assistant_message(answer: Answer) -> dict[str, Any]:
    """What the model wrote, as the message that goes into the next prompt."""
    output = answer.output
    message: dict[str, Any] = {"role": "assistant", "content": output.content}
    if output.reasoning is not None:
        message["reasoning_content"] = output.reasoning
    if output.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
            for call in output.tool_calls
        ]
    return message


def _reply(answer: Answer, usage: Usage, end: TurnEnd, structured: StructuredAnswer | None) -> Reply:
    output = answer.output
    is_whole = structured is not None and end == "stop" and not answer.is_cut
    return Reply(
        content=output.content,
        reasoning=output.reasoning,
        tool_calls=output.tool_calls,
        errors=output.errors,
        usage=usage,
        finish_reason=end,
        parsed=structured.read(output.content) if structured is not None and is_whole else None,
    )
