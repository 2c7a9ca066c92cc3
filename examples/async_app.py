"""A chat inside an app's event loop: the window stays alive, and a button stops the answer.

python examples/async_app.py "Tell me a long story." --stop-after 2
"""

from __future__ import annotations

import argparse
import asyncio

from lfm_mlx import Chat, load
from lfm_mlx.chat import TurnDone
from lfm_mlx.types import ContentDelta


async def show_answer(chat: Chat, question: str, stop_after_s: float) -> None:
    """Write an answer as it comes, as a view of an app would; the stop button is there while it is written."""
    button = None
    async for event in chat.astream(question):
        button = button or asyncio.create_task(press_stop(chat, stop_after_s))
        if isinstance(event, ContentDelta):
            print(event.text, end="", flush=True)
        elif isinstance(event, TurnDone):
            print(f"\n[{event.reply.finish_reason}]")
    if button is not None:
        button.cancel()


async def press_stop(chat: Chat, after_s: float) -> None:
    """The stop button; `chat.cancel` may be called from any thread."""
    await asyncio.sleep(after_s)
    chat.cancel()


async def run(options: argparse.Namespace) -> None:
    """The app."""
    model, tokenizer = await asyncio.to_thread(load, options.model)
    chat = Chat(model, tokenizer, max_tokens=options.max_tokens)
    await show_answer(chat, options.question, options.stop_after)
    print(f"{len(chat.messages)} messages so far")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="Tell me a long story.")
    parser.add_argument("--model", default="LiquidAI/LFM2.5-8B-A1B-MLX-4bit")
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--stop-after", type=float, default=10.0, help="seconds")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
