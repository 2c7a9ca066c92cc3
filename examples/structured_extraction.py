"""A value of a given form from a text, here through a pydantic model.

python examples/structured_extraction.py "Ada Lovelace was born in 1815."
"""

from __future__ import annotations

import argparse

from pydantic import BaseModel, Field

from lfm_mlx import Chat, load


class Person(BaseModel):
    """Somebody who is mentioned in a text."""

    name: str = Field(max_length=60)
    year_of_birth: int | None = Field(ge=0, le=2100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default="Ada Lovelace was born in 1815.")
    parser.add_argument("--model", default="LiquidAI/LFM2.5-8B-A1B-MLX-4bit")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()

    chat = Chat(*load(options.model), system="Extract the person.", max_tokens=options.max_tokens, thinking_budget=256)
    reply = chat.send(options.text, schema=Person)
    if reply.parsed is None:
        raise SystemExit(f"the answer is incomplete ({reply.finish_reason}): {reply.content}")
    person: Person = reply.parsed
    print(person.model_dump_json())


if __name__ == "__main__":
    main()
