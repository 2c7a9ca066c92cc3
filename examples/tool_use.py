"""Python functions as tools: the model calls them, and asks before it changes something.

python examples/tool_use.py "What's the weather in Paris?"
"""

from __future__ import annotations

import argparse

from lfm_mlx import Chat, load, tool
from lfm_mlx.chat import ToolResult, TurnDone
from lfm_mlx.types import ToolCall


@tool
def get_weather(city: str) -> dict[str, object]:
    """Get the current weather in a city.

    Args:
        city: the city's name
    """
    return {"temperature": 18, "condition": "sunny"}


@tool(changes=True)
def send_message(to: str, text: str) -> str:
    """Send a message to somebody."""
    return f"sent to {to}"


def ask_user(call: ToolCall) -> bool:
    """Whether the user agrees to a call of a tool that changes something."""
    return input(f"run {call.name}({call.arguments_json})? [y/N] ").strip().lower() == "y"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="What's the weather in Paris?")
    parser.add_argument("--model", default="LiquidAI/LFM2.5-8B-A1B-MLX-4bit")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()

    tools = [get_weather, send_message]
    chat = Chat(*load(options.model), tools=tools, confirm=ask_user, max_tokens=options.max_tokens)
    for event in chat.stream(options.question):
        if isinstance(event, ToolResult):
            print(f"{event.call.name}({event.call.arguments_json}) -> {event.content}")
        elif isinstance(event, TurnDone):
            print(event.reply.content)


if __name__ == "__main__":
    main()
