"""Several questions about one document, which is computed once.

python examples/long_document.py README.md "What is this?" "How is it installed?"
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lfm_mlx import Chat, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", default="LiquidAI/LFM2.5-8B-A1B-MLX-4bit")
    parser.add_argument("--max-tokens", type=int)
    options = parser.parse_args()

    text = options.document.read_text(encoding="utf-8")
    chat = Chat(*load(options.model), system=f"Answer from this document:\n\n{text}", max_tokens=options.max_tokens)
    for question in options.questions:
        chat.reset()  # Each question stands alone; the document stays computed.
        started_s = time.perf_counter()
        reply = chat.send(question)
        elapsed_s = time.perf_counter() - started_s
        print(f"> {question}\n{reply.content}")
        print(f"[prompt {reply.usage.prompt_tokens} tokens, {reply.usage.cached_tokens} cached; {elapsed_s:.1f} s]")


if __name__ == "__main__":
    main()
