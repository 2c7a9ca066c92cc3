"""`Chat`: a conversation that remembers its messages and what the model computed for them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_mlx.cache import Transcript
from lfm_mlx.chat.answer import Answer, AnswerOptions, calls_constraint
from lfm_mlx.chat.functions import FunctionTool, as_tools
from lfm_mlx.chat.messages import render_prompt
from lfm_mlx.chat.reply import ChatEvent, Reply, ToolResult, TurnDone, TurnEnd, Usage
from lfm_mlx.chat.structured import StructuredAnswer
from lfm_mlx.errors import CheckpointError, LfmError, OptionError
from lfm_mlx.model import Model
from lfm_mlx.tokenizer import Tokenizer
from lfm_mlx.types import CallError, SamplingParams, ToolCall, check_integer, check_number

FILE_FORMAT = "lfm_mlx chat 1"

Confirm = Callable[[ToolCall], bool]
"""Asked before a tool that changes something is run; False tells the model that the user declined."""


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
        self._constraint = calls_constraint(as_tools(tools), tool_choice, is_parallel=parallel_tool_calls)
        self._later_constraint = calls_constraint(as_tools(tools), "auto", is_parallel=parallel_tool_calls)
        self.tools = as_tools(tools)
        self._functions = {one.name: one for one in map(_as_function, tools) if one is not None}
        self._executes_tools = executes_tools
        self._max_rounds = max_rounds
        self._time_limit_s = time_limit_s
        self._confirm = confirm
        self._variables = dict(template_variables or {})
        self._transcript = Transcript(model.new_state())
        self._lock = threading.Lock()
        self._answer: Answer | None = None
        self._is_cancelled = False

    def send(self, content: str | None = None, *, schema: object = None) -> Reply:
        """Say something and wait for the reply.

        Args:
            content: the user's message; None lets the model go on from `messages`, such as after tool results.
            schema: a JSON schema or a pydantic model that the answer has to fit; the value is `Reply.parsed`.

        Raises:
            OptionError: an argument is refused, or another turn is being written.
            LfmError: the prompt cannot be rendered or does not fit; `messages` are as before.
        """
        for event in self.stream(content, schema=schema):
            if isinstance(event, TurnDone):
                return event.reply
        raise AssertionError("a stream ends with TurnDone")

    def stream(self, content: str | None = None, *, schema: object = None) -> Iterator[ChatEvent]:
        """As `send`, event by event; the last one is `TurnDone`. An iterator that is dropped ends the turn."""
        if not self._lock.acquire(blocking=False):
            raise OptionError("this chat is writing another turn; wait for its end, or use a second Chat")
        before = list(self.messages)
        try:
            structured = StructuredAnswer.of(schema)
            self._is_cancelled = False
            if content is not None:
                self.messages.append({"role": "user", "content": content})
            yield from self._turn(structured)
        except LfmError:
            self.messages = before
            raise
        finally:
            self._answer = None
            self._lock.release()

    def cancel(self) -> None:
        """End the turn that is being written; may be called from any thread. What was written is kept."""
        self._is_cancelled = True
        if (answer := self._answer) is not None:
            answer.cancel()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def undo(self) -> str | None:
        """Take back the last user message and everything after it; returns its text, None if there is none."""
        for index in range(len(self.messages) - 1, -1, -1):
            if self.messages[index]["role"] == "user":
                content = self.messages[index]["content"]
                del self.messages[index:]
                return str(content)
        return None

    def add_tool_result(self, call: ToolCall, content: str) -> None:
        """Append the result of a call that the caller has run; `send()` then lets the model go on."""
        self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content})

    async def asend(self, content: str | None = None, *, schema: object = None) -> Reply:
        """As `send`, in a thread; cancelling the task cancels the turn."""
        task = asyncio.ensure_future(asyncio.to_thread(self.send, content, schema=schema))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self.cancel()
            await asyncio.wait([task])
            raise

    async def astream(self, content: str | None = None, *, schema: object = None) -> AsyncIterator[ChatEvent]:
        """As `stream`, for `async for`; leaving the loop cancels the turn."""
        events = self.stream(content, schema=schema)
        is_done = False
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                is_done = isinstance(event, TurnDone)
                yield event
        finally:
            if not is_done:
                self.cancel()
            await asyncio.to_thread(_close, events)

    def save(self, path: str | Path) -> None:
        """Write the messages to a JSON file, whole or not at all."""
        path = Path(path)
        text = json.dumps({"format": FILE_FORMAT, "messages": self.messages}, ensure_ascii=False, indent=2)
        beside = path.with_name(f".{path.name}.partial")
        try:
            beside.write_text(text + "\n", encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OptionError(f"{path}: cannot be written ({error.strerror}); choose another file") from error

    def load(self, path: str | Path) -> None:
        """Go on from the messages of a file that `save` wrote.

        Raises:
            CheckpointError: the file is missing or is not such a file; the messages are as before.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); name a file that a chat was saved to") from error
        messages = stored.get("messages") if isinstance(stored, dict) else None
        is_chat = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
        if not is_chat or stored.get("format") != FILE_FORMAT:
            raise CheckpointError(f"{path}: is no saved chat, expected a JSON object with format {FILE_FORMAT!r}")
        self.messages = messages  # type: ignore[assignment]

    def _turn(self, structured: StructuredAnswer | None) -> Iterator[ChatEvent]:
        """Answers and tool runs until the model has said what it has to say."""
        started_s, usage = time.monotonic(), Usage()
        for round_number in range(self._max_rounds):
            answer = self._new_answer(structured, is_first=round_number == 0)
            yield from self._within_time(answer, started_s)
            usage = usage + answer.usage
            self.messages.append(_assistant_message(answer))
            runnable = self._runnable_calls(answer)
            is_late = self._time_limit_s is not None and time.monotonic() - started_s >= self._time_limit_s
            if not runnable or self._is_cancelled or is_late or round_number == self._max_rounds - 1:
                end = self._turn_end(answer, has_runnable=bool(runnable), is_late=is_late)
                yield TurnDone(reply=_reply(answer, usage, end, structured))
                return
            for call in answer.output.tool_calls:
                result = self._run_tool(call)
                self.add_tool_result(call, result.content)
                yield result
            for error in answer.output.errors:
                self.messages.append({"role": "user", "content": f"This call was not run: {error.message}"})

    def _new_answer(self, structured: StructuredAnswer | None, *, is_first: bool) -> Answer:
        prompt = render_prompt(self.tokenizer, self.messages, tools=self.tools, **self._variables)
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
        if self._is_cancelled:
            self._answer.cancel()
        return self._answer

    def _within_time(self, answer: Answer, started_s: float) -> Iterator[ChatEvent]:
        for event in answer:
            yield event
            if self._time_limit_s is not None and time.monotonic() - started_s >= self._time_limit_s:
                answer.cancel()

    def _runnable_calls(self, answer: Answer) -> Sequence[ToolCall]:
        """The answer's calls if this chat can run all of them."""
        calls = answer.output.tool_calls
        can_run = self._executes_tools and all(call.name in self._functions for call in calls)
        return calls if can_run and answer.finish_reason == "stop" else ()

    def _run_tool(self, call: ToolCall) -> ToolResult:
        """Run one call; whatever goes wrong is handed back to the model."""
        function = self._functions[call.name]
        try:
            if function.changes_something and self._confirm is not None and not self._confirm(call):
                return ToolResult(call=call, content="The user declined this call.", is_error=True)
            return ToolResult(call=call, content=function.call(call.arguments))
        except Exception as error:  # noqa: BLE001 - a tool is the user's code: the model is told what it raised
            return ToolResult(call=call, content=f"Error: {type(error).__name__}: {error}", is_error=True)

    def _turn_end(self, answer: Answer, *, has_runnable: bool, is_late: bool) -> TurnEnd:
        if self._is_cancelled:
            return "cancelled"
        if is_late:
            return "time_limit"
        if has_runnable:
            return "max_rounds"
        if answer.output.tool_calls and answer.finish_reason == "stop":
            return "tool_calls"
        return answer.finish_reason or "stop"


def _as_function(tool: object) -> FunctionTool | None:
    if isinstance(tool, FunctionTool):
        return tool
    is_definition = isinstance(tool, Mapping) or not callable(tool)
    return None if is_definition else FunctionTool.from_function(tool)  # type: ignore[arg-type]


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
    errors: tuple[CallError, ...] = output.errors
    is_whole = structured is not None and end == "stop" and not answer.is_cut
    return Reply(
        content=output.content,
        reasoning=output.reasoning,
        tool_calls=output.tool_calls,
        errors=errors,
        usage=usage,
        finish_reason=end,
        parsed=structured.read(output.content) if structured is not None and is_whole else None,
    )


def _close(events: Iterator[ChatEvent]) -> None:
    close = getattr(events, "close", None)
    if close is not None:
        close()
