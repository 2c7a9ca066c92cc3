"""How many ordinary texts does the loop guard take for loops?"""

from __future__ import annotations

import random
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lfm_mlx.bench.report import Report
from lfm_mlx.errors import OptionError
from lfm_mlx.parsing.loop_guard import LoopGuard
from lfm_mlx.tokenizer import Tokenizer, load_tokenizer

NUM_TEXTS = 200
MAX_TOKENS = 4096
MIN_TOKENS = 1200
"""A loop cannot be certain earlier, so that shorter texts would only flatter the rate."""

MAX_BYTES = 1_000_000
SHOWN = 10

NOTES = ("Files are drawn at random; those that are no text, or too short to hold a loop, are passed over.",)


def ask_false_alarms(
    model: Path, folder: Path | None = None, *, num_texts: int = NUM_TEXTS, max_tokens: int = MAX_TOKENS
) -> Report:
    """Show the guard, as it is by default, texts that people wrote, each as if it were an answer.

    Args:
        model: folder of a checkpoint, for its tokenizer.
        folder: of text files, with all folders in it; None takes Python's standard library: code, tables, mails, XML.
        num_texts: most files.
        max_tokens: most tokens of each.

    Raises:
        OptionError: there is no text that is long enough.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    seen: Counter[str] = Counter()
    alarms: list[tuple[str, int, int]] = []
    num_tokens = 0
    for path, tokens in _texts(load_tokenizer(model), folder, num_texts, max_tokens):
        seen[path.suffix] += 1
        num_tokens += len(tokens)
        if (alarm := find_alarm(tokens)) is not None:
            alarms.append((str(path.relative_to(folder)), *alarm))
    count = seen.total()
    if not count:
        raise OptionError(
            f"{folder} holds no text of {MIN_TOKENS:,} tokens, expected at least one; name another folder"
        )
    return Report(
        question="loops",
        parameters={"model": str(model), "folder": str(folder), "num_texts": num_texts, "max_tokens": max_tokens},
        results={
            "texts": count,
            "tokens": num_tokens,
            "alarms": [list(alarm) for alarm in alarms],
            "kinds": dict(seen),
        },
        title=f"Loop guard: {len(alarms)} of {count:,} texts taken for loops ({len(alarms) / count:.2%}), "
        f"{num_tokens:,} tokens",
        header=["text", "noticed after", "period"],
        rows=alarms[:SHOWN] or [["none", None, None]],
        notes=NOTES,
    )


def find_alarm(tokens: list[int]) -> tuple[int, int] | None:
    """Tokens read until the guard was certain of a loop, and its period; None if it never was."""
    guard = LoopGuard()
    noticed = next((number for number, token in enumerate(tokens, 1) if guard.observe(token)), None)
    return None if noticed is None else (noticed, guard.period)


def _texts(tokenizer: Tokenizer, folder: Path, num_texts: int, max_tokens: int) -> Iterator[tuple[Path, list[int]]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and "site-packages" not in path.parts)
    random.Random(0).shuffle(paths)
    for path in paths:
        if num_texts == 0:
            return
        try:
            text = path.read_text(encoding="utf-8") if path.stat().st_size <= MAX_BYTES else ""
        except (OSError, UnicodeDecodeError):
            continue
        # A token is at most a few dozen bytes: what is cut here was never to be read.
        tokens = tokenizer.encode(text[: 16 * max_tokens], add_bos=False)[:max_tokens]
        if len(tokens) >= MIN_TOKENS and "\0" not in text:
            num_texts -= 1
            yield path, tokens
