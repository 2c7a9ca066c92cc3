"""Synthetic conversations, each with exactly one right answer, generated on the fly from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tiny_families import FAMILIES
from tiny_results import answer_results
from tiny_schemas import family_tool, make_tool
from tiny_tools import Call, Tool
from tiny_turns import Turn, TurnMaker, calls_text
from tiny_words import Words

__all__ = ["Conversations", "Sample"]

_SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant", "You are an assistant.",
    "You are a helpful and honest assistant.",
    "Be helpful.", "Answer briefly.", "You are a tiny model.", "You help the user with tools.",
    "Use the tools when they fit.",
    "You are a helpful assistant that can call tools.", "You are an AI assistant. Be concise.", "Call tools to answer.",
    "You are a helpful assistant trained by Liquid AI.", "Help the user.", "You are a friendly bot.",
    "Think, then answer.",
    "You are a smart home assistant.", "You are a coding assistant.", "Answer the question of the user.",
    "Be brief and correct.",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Messages and tools for the chat template, and the text the model must write next."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    target: str
    options: dict[str, bool] = field(default_factory=dict)


class Conversations:
    """An endless source of samples; `held_out` fills them with words that training never uses."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.words = Words(self.rng, held_out)
        self.turns = TurnMaker(self.words)

    def sample(self, kind: str | None = None, num_turns: int | None = None) -> Sample:
        """One sample whose last turn is of `kind`, after `num_turns` - 1 earlier turns."""
        rng = self.rng
        kinds, weights = zip(*_MIX.items(), strict=True)
        kind = kind or rng.choices(kinds, weights)[0]
        num_turns = num_turns or rng.choices((1, 2, 3, 4), (80, 12, 6, 2))[0]
        tools = self._tools(kind)
        return self._conversation(kind, tools, num_turns)

    def _tools(self, kind: str) -> list[Tool]:
        rng = self.rng
        if kind == "no_tools" or (kind in _PLAIN and rng.random() < 0.68):
            return []
        wrap = rng.random() < 0.65
        count = rng.choices((1, 2, 3, 4, 6), (50, 32, 12, 5, 1))[0]
        if kind == "two_calls" and count == 1 and rng.random() < 0.7:
            count = 2
        tools: list[Tool] = []
        while len(tools) < count:
            tool = make_tool(self.words, wrap, small=count > 3)
            if kind == "missing" and not tools:
                tool = family_tool(rng.choice([family for family in FAMILIES if family.missing]), self.words, wrap)
            clash = (
                {other.name for other in tools}
                | {other.key for other in tools}
                | {other.thing for other in tools if other.thing}
            )
            if tool.name not in clash and tool.key not in clash and (not tool.thing or tool.thing not in clash):
                tools.append(tool)
        if kind == "missing":
            rng.shuffle(tools)
        return tools

    def _conversation(self, kind: str, tools: list[Tool], num_turns: int) -> Sample:
        rng = self.rng
        messages: list[dict[str, Any]] = []
        style = rng.random()
        if style < 0.4:
            messages.append({"role": "system", "content": rng.choice(_SYSTEMS)})
        elif style < 0.52:
            messages.append({"role": "system", "content": self._custom_system()})
        options: dict[str, bool] = {}
        if rng.random() < 0.09:
            options["enable_thinking"] = False
        keep = num_turns > 1 and rng.random() < 0.08
        if keep:
            options["preserve_thinking"] = True
        previous: Turn | None = None
        for index in range(num_turns):
            last = index == num_turns - 1
            wanted = kind if last else rng.choice(_HISTORY_TOOLS if tools else _HISTORY_PLAIN)
            turn = self.turns.make(wanted, tools, previous)
            messages.append({"role": "user", "content": turn.user})
            if last:
                return self._finish(turn, messages, tools, options, num_turns)
            messages += self._history(turn, keep or rng.random() < 0.3)
            previous = turn
        raise AssertionError("a conversation has at least one turn")

    def _custom_system(self) -> str:
        rng, words = self.rng, self.words
        return rng.choice(
            (
                f"You are {words.capital()}, a {words.word()} assistant.",
                f"Your name is {words.name()}.",
                f"{words.phrase().capitalize()}.",
                f"You work for {words.capital()}. Be {words.word()}.",
                f"The user is {words.name()}. {words.phrase().capitalize()}.",
                f"You are an expert in {words.word()}.",
                " ".join(words.phrase().capitalize() + "." for _ in range(rng.randint(2, 5))),
            )
        )

    def _history(self, turn: Turn, thinking: bool) -> list[dict[str, Any]]:
        first: dict[str, Any] = {"role": "assistant", "content": turn.answer if not turn.calls else ""}
        if thinking:
            first["reasoning_content"] = turn.thinking
        if not turn.calls:
            return [first]
        first["tool_calls"] = _tool_calls(turn.calls)
        last: dict[str, Any] = {"role": "assistant", "content": answer_results(turn.results)}
        if thinking:
            last["reasoning_content"] = turn.result_thinking
        return [first, *[{"role": "tool", "content": result} for result in turn.results], last]

    def _finish(
        self, turn: Turn, messages: list[dict[str, Any]], tools: list[Tool], options: dict[str, bool], num_turns: int
    ) -> Sample:
        direct = options.get("enable_thinking") is False
        kind = turn.kind if num_turns == 1 else f"multi_{turn.kind}"
        if turn.kind == "tool_answer":
            call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": _tool_calls(turn.calls)}
            if self.rng.random() < 0.5 and not direct:
                call["reasoning_content"] = turn.thinking
            messages.append(call)
            messages += [{"role": "tool", "content": result} for result in turn.results]
            thinking, answer = turn.result_thinking, answer_results(turn.results)
        else:
            thinking, answer = turn.thinking, calls_text(turn.calls) if turn.calls else turn.answer
        target = answer if direct else f"<think>{thinking}</think>{answer}"
        schemas = [tool.schema for tool in tools] or None
        return Sample(kind=kind, messages=messages, tools=schemas, target=target + "<|im_end|>", options=options)


def _tool_calls(calls: list[Call]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]


_MIX = {
    "fact": 22, "sum": 10, "chat": 4, "unknown": 5, "no_tools": 4, "no_fit": 4.5, "one_call": 27,
    "two_calls": 15, "tool_answer": 12,
    "missing": 2, "notes": 4, "memory": 2, "repeat": 2,
}  # fmt: skip
_PLAIN = {"fact", "sum", "chat", "unknown", "notes", "memory", "repeat"}
_HISTORY_TOOLS = (
    "one_call",
    "one_call",
    "one_call",
    "two_calls",
    "fact",
    "sum",
    "chat",
    "unknown",
    "no_fit",
    "missing",
    "memory",
)
_HISTORY_PLAIN = ("fact", "fact", "sum", "chat", "unknown", "no_tools", "memory", "repeat", "notes")
