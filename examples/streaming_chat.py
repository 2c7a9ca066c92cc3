"""A chat in the terminal that shows reasoning and answer as they are written.

python examples/streaming_chat.py "What is the capital of France?" "And of Italy?"
"""

from __future__ import annotations

import argparse

from lfm_mlx import Chat, load
from lfm_mlx.chat import TurnDone
from lfm_mlx.types import ContentDelta, ReasoningDelta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=["What is the capital of France?"])
    parser.add_argument("--model", default="LiquidAI/LFM2.5-8B-A1B-MLX-4bit")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    chat = Chat(model, tokenizer, max_tokens=options.max_tokens, thinking_budget=1024)
    for question in options.questions:
        print(f"> {question}")
        for event in chat.stream(question):
            if isinstance(event, ReasoningDelta):
                print(f"\033[2m{event.text}\033[0m", end="", flush=True)
            elif isinstance(event, ContentDelta):
                print(event.text, end="", flush=True)
            elif isinstance(event, TurnDone):
                usage = event.reply.usage
                print(f"\n[{usage.completion_tokens} tokens; {usage.cached_tokens} of the prompt were known]")


if __name__ == "__main__":
    main()
