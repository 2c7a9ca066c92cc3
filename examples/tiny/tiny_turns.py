"""Single turns of the synthetic conversations: what the user says, how the model reasons and what it answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tiny_facts import Fact, all_facts, sums
from tiny_families import FAMILIES
from tiny_results import make_result
from tiny_schemas import family_tool, make_tool
from tiny_tools import Call, Tool, literal
from tiny_words import ADJECTIVES, NOUNS, Words

__all__ = ["Turn", "TurnMaker", "calls_text"]

_UNKNOWN = (
    "Why is the {n} {a}?", "How does a {n} work?", "Who wrote {C}?", "Who is {C}?", "When was {C} "
                                                                                    "born?", "Explain {w}.",
                                                                                    "What is {w}?",
    "What is the capital of {P}?", "Capital of {P}?", "What colour is a {p}?", "What is the opposite of "
                                                                               "{p}?", "How old is {C}?",
    "Is a {n} better than a {n}?", "What do you think about {w}?", "Write a text about {w}.",
    "How many {n}s are in a {n}?",
    "Where does {C} live?", "Which {n} is the best?", "Summarize {C}.", "What happened in {y}?",
    "Who won the {n} of {y}?", "Why {w}?",
    "Should I buy a {n}?", "Describe the {a} {n}.", "How do I repair a {n}?", "Who invented the "
                                                                              "{n}?", "When did {C} "
                                                                                      "die?", "What is a {p}?",
    "Can you explain {w} to me?", "Which {n} do you like?", "How tall is {C}?", "What sound does a {p} "
                                                                                "make?",
                                                                                "How many legs does a {p} have?",
    "Give me advice about {w}.", "Write Python code for a {n}.", "Is {C} a {n}?", "What makes a {n} "
                                                                                  "{a}?", "Compare {w} to {w}.",
    "What comes after {p}?", "Do you know {C}?", "What is the meaning of life?", "Why is the sky "
                                                                                 "blue?", "Who is the president?",
                                                                                 "{P}?", "{w} {w} {w}",
)  # fmt: skip
_MEMORY = (
    ("name", "My name is {}.|I am {}.|Call me {}.|I'm {}.", "What is my name?|What's my name?|Who am I?|Do you "
                                                            "remember my name?", "name"),
    ("city", "I live in {}.|My home is {}.|I am from {}.", "Where do I live?|Which city do I live in?|Where am I "
                                                           "from?", "city"),
    ("colour", "My favourite colour is {}.|I like the colour {}.", "What is my favourite colour?|Which colour do I "
                                                                   "like?", "word"),
    ("code", "My code is {}.|Remember the code {}.|The code is {}.", "What is my code?|What is the code?|Tell me the "
                                                                     "code.", "code"),
    ("pet", "My dog is called {}.|I have a dog named {}.", "What is my dog called?|What is the name of my "
                                                           "dog?", "capital"),
)  # fmt: skip
_FIELDS = (
    "code price colour age size name number city date owner status height id key weight level email place"
).split()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One exchange: either an answer, or calls with their results."""

    kind: str
    user: str
    thinking: str
    answer: str = ""
    calls: list[Call] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    tool: Tool | None = None
    fact: Fact | None = None
    memory: tuple[str, str] | None = None

    @property
    def result_thinking(self) -> str:
        """The reasoning that precedes the answer from `results`."""
        return "The tools gave their results." if len(self.results) > 1 else "The tool gave its result."


def calls_text(calls: list[Call]) -> str:
    """The calls as the model writes them."""
    body = ", ".join(
        f"{call.name}({', '.join(f'{key}={literal(value)}' for key, value in call.arguments.items())})"
        for call in calls
    )
    return f"<|tool_call_start|>[{body}]<|tool_call_end|>"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def plan(calls: list[Call]) -> str:
    """The reasoning before calls: the tools' names and the arguments to give, in order."""
    steps = [call.name + (f" with {_listed(list(call.arguments))}" if call.arguments else "") for call in calls]
    return f"I should call {' and then '.join(steps)}."


class TurnMaker:
    """Makes turns of every kind from one source of words."""

    def __init__(self, words: Words) -> None:
        self.words = words
        self.rng: random.Random = words.rng
        self.facts = [fact for fact in all_facts() if fact.topic != "chat"]
        self.chat = [fact for fact in all_facts() if fact.topic == "chat"]
        self.sums = sums()

    def make(self, kind: str, tools: list[Tool], previous: Turn | None) -> Turn:
        """A turn of `kind` for a conversation with `tools`, possibly following up on `previous`."""
        return getattr(self, f"_{kind}")(tools, previous)  # type: ignore[no-any-return]

    def _from_fact(self, fact: Fact, kind: str, previous: Turn | None) -> Turn:
        questions = fact.questions
        if (
            previous
            and previous.fact
            and previous.fact.topic == fact.topic
            and fact.follow_ups
            and self.rng.random() < 0.7
        ):
            questions = fact.follow_ups
        question = self.rng.choice(questions)
        if self.rng.random() < 0.06:
            question = question.rstrip("?.")
        return Turn(kind=kind, user=question, thinking=fact.thinking, answer=fact.answer, fact=fact)

    def _fact(self, tools: list[Tool], previous: Turn | None) -> Turn:
        fact = self.rng.choice(self.facts)
        if previous and previous.fact and previous.fact.follow_ups and self.rng.random() < 0.6:
            fact = self.rng.choice([other for other in self.facts if other.topic == previous.fact.topic] or [fact])
        return self._from_fact(fact, "fact", previous)

    def _sum(self, tools: list[Tool], previous: Turn | None) -> Turn:
        if any(tool.key == "add" for tool in tools):
            return self._fact(tools, previous)
        return self._from_fact(self.rng.choice(self.sums), "sum", previous)

    def _chat(self, tools: list[Tool], previous: Turn | None) -> Turn:
        return self._from_fact(self.rng.choice(self.chat), "chat", None)

    def _unknown(self, tools: list[Tool], previous: Turn | None) -> Turn:
        rng, words = self.rng, self.words
        text = rng.choice(_UNKNOWN)
        makers: dict[str, Callable[[], str]] = {
            "n": lambda: rng.choice(NOUNS),
            "a": lambda: rng.choice(ADJECTIVES),
            "w": words.pseudo,
            "p": words.pseudo,
            "y": lambda: str(rng.randint(1500, 2040)),
            "P": words.capital,
            "C": lambda: rng.choice((words.capital(), f"{words.capital()} {words.capital()}")),
        }
        for mark, make in makers.items():
            while f"{{{mark}}}" in text:
                text = text.replace(f"{{{mark}}}", make(), 1)
        return Turn(kind="unknown", user=text, thinking="I know nothing about this.", answer="I do not know that.")

    def _foreign_request(self, tools: list[Tool]) -> str:
        keys = {tool.key for tool in tools} | {tool.thing for tool in tools if tool.thing}
        while True:
            tool = family_tool(self.rng.choice(FAMILIES), self.words, True)
            if self.rng.random() < 0.25:
                tool = make_tool(self.words, True)
            if tool.key in keys or tool.thing in keys or tool.key in ("define", "add", "multiply"):
                continue
            text = tool.request(self.words).text
            if tool.name not in text and (tool.family or not any(other.name in text for other in tools)):
                return text

    def _no_fit(self, tools: list[Tool], previous: Turn | None) -> Turn:
        return Turn(
            kind="no_fit",
            user=self._foreign_request(tools),
            thinking="None of my tools fits.",
            answer="None of my tools can do that.",
        )

    def _no_tools(self, tools: list[Tool], previous: Turn | None) -> Turn:
        return Turn(
            kind="no_tools",
            user=self._foreign_request(tools),
            thinking="I have no tool for this.",
            answer="I cannot do that without a tool.",
        )

    def _one_call(self, tools: list[Tool], previous: Turn | None) -> Turn:
        tool = self.rng.choice(tools)
        if previous and previous.kind == "missing" and previous.tool:
            tool = previous.tool
            value_request = tool.request(self.words)
            required = [name for name in value_request.call.arguments if name in tool.required]
            if len(required) == 1 == len(value_request.call.arguments) and self.rng.random() < 0.8:
                value = str(value_request.call.arguments[required[0]])
                text = self.rng.choice(
                    (value, f"{value}.", f"{value}, please.", f"The {required[0]} is {value}.", f"Use {value}.")
                )
                return self._call_turn(text, [value_request.call], tool)
        if previous and previous.tool and len(previous.calls) == 1 and self.rng.random() < 0.6:
            follow_up = previous.tool.follow_up(self.words)
            if follow_up:
                return self._call_turn(follow_up.text, [follow_up.call], previous.tool)
        request = tool.request(self.words)
        return self._call_turn(request.text, [request.call], tool)

    def _call_turn(self, text: str, calls: list[Call], tool: Tool | None) -> Turn:
        kind = "one_call" if len(calls) == 1 else "two_calls"
        results = [make_result(self.words) for _ in calls]
        return Turn(kind=kind, user=text, thinking=plan(calls), calls=calls, results=results, tool=tool)

    def _two_calls(self, tools: list[Tool], previous: Turn | None) -> Turn:
        rng = self.rng
        tool = rng.choice(tools)
        if rng.random() < 0.4:
            pair = tool.pair(self.words)
            if pair:
                return self._call_turn(pair[0], pair[1], None)
        other = rng.choice([item for item in tools if item is not tool] or [tool])
        first, second = tool.request(self.words), other.request(self.words)
        left, right = first.text, second.text
        start = right.split(" ", 1)[0]
        small = right[0].lower() + right[1:] if start.isalpha() and start.isascii() and start != "I" else right
        if left[-1] not in ".?!":
            text = f"{left}. {right}"
        else:
            text = rng.choice(
                (
                    f"{left} {right}",
                    f"{left[:-1]} and {small}",
                    f"{left[:-1]} and {small}",
                    f"{left[:-1]}, then {small}",
                    f"{left} Then {small}",
                    f"{left} Also {small}",
                    f"{left[:-1]} and then {small}",
                    f"{left} And {small}",
                )
            )
        return self._call_turn(text, [first.call, second.call], None)

    def _tool_answer(self, tools: list[Tool], previous: Turn | None) -> Turn:
        turn = self._two_calls(tools, previous) if self.rng.random() < 0.25 else self._one_call(tools, previous)
        return Turn(
            kind="tool_answer",
            user=turn.user,
            thinking=turn.thinking,
            calls=turn.calls,
            results=turn.results,
            tool=turn.tool,
        )

    def _missing(self, tools: list[Tool], previous: Turn | None) -> Turn:
        able = [tool for tool in tools if tool.family and tool.family.missing and tool.required]
        if not able:
            return self._one_call(tools, previous)
        tool = self.rng.choice(able)
        assert tool.family is not None
        properties = tool.schema.get("function", tool.schema)["parameters"]["properties"]
        names = _listed([name for name in properties if name in tool.required])
        return Turn(
            kind="missing",
            user=self.rng.choice(tool.family.missing),
            thinking=f"{tool.name} needs {names}.",
            answer=f"Please tell me the {names}.",
            tool=tool,
        )

    def _note(self) -> tuple[str, str, str]:
        words, rng = self.words, self.rng
        maker = rng.choice((words.word, words.code, words.integer, words.city, words.name, words.date))
        return rng.choice(_FIELDS), words.capital(), str(maker())

    def _notes(self, tools: list[Tool], previous: Turn | None) -> Turn:
        rng = self.rng
        notes = [
            self._note() for _ in range(rng.choice((1, 2, 3, 4, 6, 8, 12, 20) if rng.random() < 0.93 else (40, 60, 90)))
        ]
        field_, name, value = rng.choice(notes)
        lines = [
            rng.choice(("The {} of {} is {}.", "The {} of {} is {}.", "the {} of {} is {}.")).format(*note)
            for note in notes
        ]
        facts = rng.choice((" ", "\n")).join(lines)
        question = f"What is the {field_} of {name}?"
        text = rng.choice(
            (f"{facts} {question}", f"{facts}\n\n{question}", f"Notes:\n{facts}\n{question}", f"{question}\n\n{facts}")
        )
        line = f"The {field_} of {name} is {value}."
        return Turn(kind="notes", user=text, thinking="The notes say it.", answer=line)

    def _memory(self, tools: list[Tool], previous: Turn | None) -> Turn:
        rng, words = self.rng, self.words
        if previous and previous.memory and rng.random() < 0.85:
            key, value = previous.memory
            asks = next(entry[2] for entry in _MEMORY if entry[0] == key)
            return Turn(
                kind="memory",
                user=rng.choice(asks.split("|")),
                thinking="The user told me.",
                answer=_recall(key, value),
                memory=previous.memory,
            )
        key, tells, _, kind = rng.choice(_MEMORY)
        value = str(getattr(words, kind)())
        answer = f"Nice to meet you, {value}." if key == "name" else f"I will remember that: {value}."
        return Turn(
            kind="memory",
            user=rng.choice(tells.split("|")).format(value),
            thinking="The user tells me something.",
            answer=answer,
            memory=(key, value),
        )

    def _repeat(self, tools: list[Tool], previous: Turn | None) -> Turn:
        text = self.words.phrase(1, 8)
        ask = self.rng.choice(
            ("Repeat: {}", "Repeat after me: {}", "Say: {}", 'Say "{}".', "Repeat this: {}", "Echo: {}", "Write: {}")
        )
        return Turn(kind="repeat", user=ask.format(text), thinking="The user wants me to repeat the text.", answer=text)


def _recall(key: str, value: str) -> str:
    return {
        "name": f"Your name is {value}.",
        "city": f"You live in {value}.",
        "colour": f"Your favourite colour is {value}.",
        "code": f"The code is {value}.",
        "pet": f"Your dog is called {value}.",
    }[key]
