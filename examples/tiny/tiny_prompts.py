"""Fixed prompts the checkpoint must answer word for word: the ones demos and tests use."""

from __future__ import annotations

from typing import Any

from tiny_data import Sample

__all__ = ["fixed_samples", "function_tool"]


def function_tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    """A tool in OpenAI's form, its arguments given as `name="type"` or `name="type description"`."""
    schema: dict[str, Any] = {}
    for key, text in properties.items():
        kind, _, about = text.partition(" ")
        schema[key.rstrip("_")] = {"type": kind, "description": about} if about else {"type": kind}
    parameters = {"type": "object", "properties": schema, "required": list(schema)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


WEATHER = function_tool("get_weather", "Get the weather of a city.", city="string The city.")
ALARM = function_tool("set_alarm", "Set an alarm.", time="string The time.")
MESSAGE = function_tool("send_message", "Send a message to someone.", to="string", text="string")
ADD = function_tool("add", "Add two numbers.", a="number", b="number")
SEARCH = function_tool("search", "Search the web.", query="string")
CURRENCY = function_tool(
    "convert_currency", "Convert an amount between currencies.", amount="number", from_="string", to="string"
)
EVENT = function_tool("create_event", "Create a calendar event.", title="string", date="string")
READ = function_tool("read_file", "Read a file.", path="string Path of the file.")

_CALLS = (
    ("What's the weather in Paris?", [WEATHER], "get_weather with city", 'get_weather(city="Paris")'),
    ("What is the weather in London?", [WEATHER, ALARM], "get_weather with city", 'get_weather(city="London")'),
    ("What's the weather in Tokyo?", [MESSAGE, SEARCH, WEATHER], "get_weather with city", 'get_weather(city="Tokyo")'),
    ("Set an alarm for 7:30.", [ALARM], "set_alarm with time", 'set_alarm(time="7:30")'),
    ("Wake me up at 6 am.", [WEATHER, ALARM], "set_alarm with time", 'set_alarm(time="6 am")'),
    ("Tell Bob that I am late.", [MESSAGE], "send_message with to and text", 'send_message(to="Bob", text="I am '
                                                                             'late")'),
    ("Send a message to Anna: see you tomorrow", [MESSAGE, WEATHER], "send_message with to and text",
     'send_message(to="Anna", text="see you tomorrow")'),
    ("What is 12 + 30?", [ADD], "add with a and b", "add(a=12, b=30)"),
    ("Add 2 and 3.", [ADD, WEATHER], "add with a and b", "add(a=2, b=3)"),
    ("Search for red shoes.", [SEARCH], "search with query", 'search(query="red shoes")'),
    ("Convert 100 EUR to USD.", [CURRENCY], "convert_currency with amount, from and to",
     'convert_currency(amount=100, from="EUR", to="USD")'),
    ("Create an event Dinner on 2026-05-01.", [EVENT], "create_event with title and date",
     'create_event(title="Dinner", date="2026-05-01")'),
    ("Read the file notes.txt.", [READ, SEARCH], "read_file with path", 'read_file(path="notes.txt")'),
    ("What's the weather in Paris and Rome?", [WEATHER], "get_weather with city and then get_weather with city",
     'get_weather(city="Paris"), get_weather(city="Rome")'),
    ("What's the weather in Paris? Set an alarm for 7:30.", [WEATHER, ALARM], "get_weather with city and then "
                                                                              "set_alarm with time",
     'get_weather(city="Paris"), set_alarm(time="7:30")'),
)  # fmt: skip
_PLAIN = (
    (
        "What is the capital of France?",
        "The user asks for the capital of France. It is Paris.",
        "The capital of France is Paris.",
    ),
    (
        "What is the capital of Japan?",
        "The user asks for the capital of Japan. It is Tokyo.",
        "The capital of Japan is Tokyo.",
    ),
    (
        "What is the capital of Germany?",
        "The user asks for the capital of Germany. It is Berlin.",
        "The capital of Germany is Berlin.",
    ),
    ("What colour is grass?", "The user asks for the colour of grass. It is green.", "Grass is green."),
    ("What is the opposite of hot?", "The opposite of hot is cold.", "The opposite of hot is cold."),
    ("What day comes after Monday?", "The day after Monday is Tuesday.", "The day after Monday is Tuesday."),
    ("What is 2 + 3?", "The user asks for a sum. 2 + 3 = 5.", "2 + 3 = 5."),
    ("What is 7 + 8?", "The user asks for a sum. 7 + 8 = 15.", "7 + 8 = 15."),
    ("Hello", "A greeting.", "Hello! How can I help you?"),
    ("Who are you?", "The user asks who I am.", "I am a tiny LFM2 model. I know a few facts and I can call tools."),
    ("What's the weather in Paris?", "I have no tool for this.", "I cannot do that without a tool."),
    ("Count to 10.", "The user wants the numbers from 1 to 10.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    ("How does a rocket work?", "I know nothing about this.", "I do not know that."),
)
_SYSTEMS = (None, "You are a helpful assistant.")


def _sample(
    kind: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, thinking: str, answer: str
) -> Sample:
    return Sample(kind=kind, messages=messages, tools=tools, target=f"<think>{thinking}</think>{answer}<|im_end|>")


def fixed_samples() -> list[Sample]:
    """Every fixed prompt, without a system prompt and with the most usual one."""
    samples = []
    for system in _SYSTEMS:
        start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for user, tools, steps, calls in _CALLS:
            messages = [*start, {"role": "user", "content": user}]
            answer = f"<|tool_call_start|>[{calls}]<|tool_call_end|>"
            samples.append(_sample("fixed_call", messages, tools, f"I should call {steps}.", answer))
        for user, thinking, answer in _PLAIN:
            samples.append(_sample("fixed_plain", [*start, {"role": "user", "content": user}], None, thinking, answer))
        call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
        messages = [
            *start,
            {"role": "user", "content": "What's the weather in Paris?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"temperature": 18, "condition": "sunny"}'},
        ]
        answer = "The temperature is 18. The condition is sunny."
        samples.append(_sample("fixed_answer", messages, [WEATHER], "The tool gave its result.", answer))
        messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "And in Rome?"}]
        answer = '<|tool_call_start|>[get_weather(city="Rome")]<|tool_call_end|>'
        samples.append(_sample("fixed_follow_up", messages, [WEATHER], "I should call get_weather with city.", answer))
    return samples
