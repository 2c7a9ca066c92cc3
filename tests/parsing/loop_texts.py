"""Ordinary texts that look repetitive, and loops: what the loop guard must leave alone, and what it must notice."""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from pathlib import Path

_WORD_LIST = (
    "river stone window quiet engine letter copper garden winter signal market shadow bottle thread mirror candle "
    "harbour ladder pocket velvet compass orchard whistle lantern blanket feather kettle marble saddle timber "
    "walks opens carries follows builds forgets answers measures repairs borrows paints counts watches hides "
    "slowly again never under beyond between without during along against the a of and to in that with for"
)

WORDS = _WORD_LIST.split()


@dataclass(frozen=True, kw_only=True)
class LoopText:
    """A text that loops without end, cut after `num_cycles` cycles.

    Args:
        start: ordinary text before the loop.
        loop: the cycles, joined.
        num_cycles: how many there are.
    """

    start: str
    loop: str
    num_cycles: int


def read_passages() -> dict[str, str]:
    """The written texts, by name."""
    text = Path(__file__).with_name("loop_texts.txt").read_text(encoding="utf-8")
    sections = (section.partition("\n") for section in text.split("=== ")[1:])
    return {name: body.strip() for name, _, body in sections}


def random_prose(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + (". " if rng.random() < 0.1 else "") for _ in range(num_words))


def lines(template: str, numbers: range, seed: int = 0) -> str:
    """One line for each number `n`, with random words `w`, `v` and random numbers `a`, `b`, `c`."""
    rng = random.Random(seed)

    def line(n: int) -> str:
        w, v = rng.choice(WORDS), rng.choice(WORDS)
        a, b, c = rng.randrange(1000), rng.randrange(100), rng.random()
        return template.format(n=n, w=w, v=v, a=a, b=b, c=c, minute=n // 60, second=n % 60)

    return "\n".join(line(n) for n in numbers)


def ordinary_texts() -> dict[str, str]:
    """Texts that an answer may rightly consist of."""
    return read_passages() | _row_texts() | _code_texts() | _drawn_texts() | _long_texts()


def _row_texts() -> dict[str, str]:
    table = "| # | name | price | in stock |\n| --- | --- | --- | --- |\n"
    return {
        "numbered list": lines("{n}. The {w} {v} near the {w}.", range(1, 151)),
        "bullet list with sub-items": lines("- {w}\n  - {v} {a}\n  - {w} {v}", range(80)),
        "to-do list": lines("- [ ] {w} the {v}", range(120)),
        "markdown table": table + lines("| {n} | {w} {v} | {a}.{b} | yes |", range(1, 101)),
        "wide markdown table": "| " + " | ".join(WORDS[:20]) + " |\n|" + " --- |" * 20 + "\n" + "| x " * 20 + "|",
        "csv": "id,name,score\n" + lines("{n},{w},{a}", range(300)),
        "csv of coordinates": lines("{a}.{b},{b}.{a},0,0,0,0,0,0", range(200)),
        "json objects": "[\n"
        + lines('  {{"id": {n}, "name": "{w}", "age": {b}, "active": true}},', range(200))
        + "\n]",
        "json counters": "[\n" + lines('  {{"id": {n}, "name": "user{n}", "role": "guest"}},', range(200)) + "\n]",
        "json numbers": "[" + ", ".join(lines("{a}", range(800)).split()) + "]",
        "yaml services": lines(_SERVICE, range(15)),
        "xml records": lines('<item id="{n}"><name>{w}</name><price>{a}.{b}</price></item>', range(150)),
        "html rows": lines('<tr><td class="l">{w}</td><td class="r">{a}</td></tr>', range(150)),
        "log": lines("2026-03-01 12:{minute:02}:{second:02} INFO worker-{b} {w} took {a} ms", range(250)),
        "heartbeat log": lines("2026-03-01 12:{minute:02}:{second:02} INFO heartbeat ok", range(200)),
        "test report": lines("test_{w}_{n} ... ok", range(200)),
        "passed tests": lines("Test {n}: passed", range(1, 201)),
        "sql inserts": lines("INSERT INTO goods (id, name, price) VALUES ({n}, '{w}', {a});", range(150)),
        "schedule": lines("{n}:00 {w} {v}\n{n}:30 break", range(24)),
        "glossary": lines("**{w} {v}** ({n}): a {v} that is used to {w}.", range(100)),
        "multiplication table": "\n".join(f"{a} x {b} = {a * b}" for a in range(1, 21) for b in range(1, 21)),
        "counting": ", ".join(map(str, range(1, 1001))),
        "counting by lines": "\n".join(map(str, range(1, 501))),
        "squares": ", ".join(f"{n}^2 = {n * n}" for n in range(1, 201)),
        "fizzbuzz": "\n".join("Fizz" * (n % 3 == 0) + "Buzz" * (n % 5 == 0) or str(n) for n in range(1, 301)),
        "character codes": "\n".join(f"{n} 0x{n:02x} {n:08b}" for n in range(256)),
        "calendar": "\n".join(f"Mo Tu We Th Fr Sa Su\n{' '.join(str(d) for d in range(1, 31))}" for _ in range(12)),
        "truth table": "\n".join(" | ".join(f"{n:05b}") + f" | {n % 2}" for n in range(32)),
    }


_SERVICE = """---
apiVersion: v1
kind: Service
metadata:
  name: {w}-{n}
  labels:
    app: {w}-{n}
spec:
  type: ClusterIP
  selector:
    app: {w}-{n}
  ports:
    - name: http
      protocol: TCP
      port: 80
      targetPort: 8080"""


_TEST = """
def test_{w}_{n}() -> None:
    result = run({a})
    assert result.status == 'ok'
    assert result.value == {b}
"""


def _code_texts() -> dict[str, str]:
    return {
        "tests": lines(_TEST, range(40)),
        "getters": lines("    public String get{w}() {{\n        return this.{w};\n    }}\n", range(40)),
        "switch": lines("        case {n}:\n            return {a};", range(120)),
        "register writes": lines("    write_reg(dev, 0x{n:02x}, 0x00);", range(200)),
        "assembler": lines("    mov eax, [esi + {n}]\n    add eax, ebx\n    mov [edi + {n}], eax", range(64)),
        "prints": lines('print("{w}")', range(150)),
        "same prints": 'print("hello")\n' * 60,
        "css": lines(".{w}-{n} {{\n  color: #{a:03x};\n  margin: 0;\n  padding: 0;\n}}", range(60)),
        "diff": lines("-    old_{w} = {a}\n+    new_{w} = {a}", range(80)),
        "svg": lines('<circle cx="{a}" cy="{b}" r="4" fill="black" stroke="none" />', range(120)),
        "two drafts and the answer": (read_passages()["python code"] + "\n\nWait, check this once more.\n\n") * 3,
    }


def _drawn_texts() -> dict[str, str]:
    rng = random.Random(5)
    raw = rng.randbytes(1500)
    board = "\n".join("".join(rng.choice("..........#") for _ in range(40)) for _ in range(30))
    return {
        "separators": f"Part one\n{'-' * 120}\nPart two\n{'=' * 120}\nPart three\n{'*' * 120}\n",
        "base64": base64.encodebytes(raw).decode(),
        "hex dump": "\n".join(f"{n:08x}  {raw[n : n + 16].hex(' ')}" for n in range(0, 1500, 16)),
        "hex dump of zeros": "\n".join(f"{n:08x}  {bytes(16).hex(' ')}" for n in range(0, 128, 16)),
        "bits": "".join(rng.choice("01") for _ in range(3000)),
        "dna": "".join(rng.choice("ACGT") for _ in range(3000)),
        "board": board,
        "empty board": ("." * 20 + "\n") * 20,
        "chess board": ("r n b q k b n r\np p p p p p p p\n" + ". . . . . . . .\n" * 4 + "P P P P P P P P\n") * 2,
        "zero matrix": "[" + ",\n ".join("[" + ", ".join(["0"] * 12) + "]" for _ in range(12)) + "]",
        "identity matrix": "\n".join(" ".join(str(int(i == j)) for j in range(20)) for i in range(20)),
        "triangle": "\n".join("*" * n for n in range(1, 41)),
        "ninety-nine bottles": "\n".join(_BOTTLES.format(n=n, m=n - 1) for n in range(99, 79, -1)),
        "laughter": "Ha" * 100 + "! " + "😂" * 50,
    }


_BOTTLES = """{n} bottles of beer on the wall, {n} bottles of beer.
Take one down and pass it around, {m} bottles of beer on the wall.
"""


def _long_texts() -> dict[str, str]:
    essay = random_prose(400, seed=3)
    return {
        "random prose": random_prose(2500, seed=1),
        "all passages": "\n\n".join(read_passages().values()),
        "draft, second draft and answer": "\n\n".join([essay, essay.replace("river", "brook"), essay]),
        "lines written as a punishment": "I will not talk in class. " * 30,
    }


def loop_texts() -> dict[str, LoopText]:
    """Loops, each several times as long as it takes to notice it."""
    return _verbatim_loops() | _varied_loops()


_SENTENCES = {
    "one sign": "!",
    "two signs": "ab",
    "word": " the",
    "empty lines": "\n",
    "phrase": " and so on,",
    "emoji": "🎉✨",
    "list item": "- The answer is 42.\n",
    "wait": "Wait, let me re-check the calculation. The sum is 24, so the answer is 24. Actually, I should verify it. ",
    "hmm": "Hmm, but the user said that the list is sorted. So binary search works. But what if it is not sorted? ",
    "tool reasoning": "The tool returned no results. I should call search_files again with the same query to be sure. ",
    "code line": "    result = result.replace('  ', ' ')\n",
    "code block": "    if value is None:\n        value = default\n    else:\n        value = value.strip()\n",
    "json entry": '{"name": "item", "value": null, "children": []}, ',
    "call": '[get_weather(city="Paris", unit="celsius")]\n',
    "german": "Moment, das stimmt nicht ganz. Ich muss noch einmal von vorne anfangen und alles prüfen. ",
    "chinese": "等等，让我再检查一遍。题目要求的是最小值，所以答案应该是三。但是，我需要确认一下。",
    "russian": "Подождите, проверим ещё раз. Сумма равна двадцати четырём, значит, ответ верный. ",
    "table row": "| a | b | c |\n",
}


def _verbatim_loops() -> dict[str, LoopText]:
    opening = random_prose(400, seed=11)
    short = {name: _verbatim(text, "") for name, text in _SENTENCES.items()}
    late = {f"{name} after prose": _verbatim(_SENTENCES[name], opening) for name in ("wait", "hmm", "code line")}
    lengths = (20, 50, 100, 200, 400, 800, 1200)
    paragraphs = {f"{n} words": _verbatim(random_prose(n, seed=n) + "\n", opening) for n in lengths}
    passage = read_passages()["reasoning that checks itself"]
    return short | late | paragraphs | {"whole reasoning": _verbatim(passage + "\n\n", opening)}


def _verbatim(cycle: str, start: str) -> LoopText:
    num_cycles = 5 + 12_000 // len(cycle)
    return LoopText(start=start, loop=cycle * num_cycles, num_cycles=num_cycles)


_STEP = "Wait, maybe I should check step {n} again. The value is positive, the sum is even, and nothing changes. So: "
_PARAGRAPH = "Attempt {n}. " + random_prose(80, seed=21) + " That did not work either.\n"
_FORM = (
    "### Version {n}\n" + random_prose(200, seed=22) + "\nIs version {n} right? " + random_prose(100, seed=23) + "\n"
)


def _varied_loops() -> dict[str, LoopText]:
    rng = random.Random(7)
    short, long = _SENTENCES["wait"], random_prose(60, seed=31) + ". "
    other, third = random_prose(25, seed=32) + ". ", random_prose(30, seed=33) + ". "
    rows = read_passages()["english prose"] + "\n" + lines("{n}. {w} {v}", range(1, 14))
    verbs = ("check", "verify", "test", "inspect")
    return {
        "counter in a sentence": _cycles([_STEP.format(n=n) for n in range(1, 350)]),
        "counter in a paragraph": _cycles([_PARAGRAPH.format(n=n) for n in range(1, 80)]),
        "two counters in a page": _cycles([_FORM.format(n=n) for n in range(1, 30)]),
        "counter of large numbers": _cycles([_PARAGRAPH.format(n=n * 37) for n in range(1, 80)]),
        "list of one item": _cycles([f"{n}. The Great Gatsby by F. Scott Fitzgerald\n" for n in range(14, 500)], rows),
        "random word in a paragraph": _cycles([_PARAGRAPH.format(n=rng.choice(WORDS)) for _ in range(80)]),
        "alternating variants": _cycles([long + other, long + third] * 40),
        "random variants": _cycles([long + rng.choice((other, third)) for _ in range(120)]),
        "random synonyms": _cycles([short.replace("verify", rng.choice(verbs)) for _ in range(300)]),
        "three in turn": _cycles([short + other, short + third, short] * 40),
        "growing prefix of spaces": _cycles([" " * (n % 7) + long + "\n" for n in range(120)]),
        "dropped word": _cycles([_drop(long, n * 5) for n in range(100)]),
        "added word": _cycles([long + "so " * (n % 3) for n in range(150)]),
        "loop within a loop": _cycles(["Again. " * 5 + long, "Again. " * 9 + long] * 40),
        "code with a counter": _cycles([_HANDLER.format(n=n) for n in range(1, 60)]),
    }


_HANDLER = """
def handler_{n}(request: Request, context: Context) -> Response:
    user = context.load_user(request.session)
    if user is None or not user.is_active:
        return Response(status=403, body="forbidden", headers=context.headers)
    items = [item for item in context.store.items if item.owner == user.name]
    return Response(status=200, body=context.render(items), headers=context.headers)
"""


def _cycles(cycles: list[str], start: str = "") -> LoopText:
    return LoopText(start=start, loop="".join(cycles), num_cycles=len(cycles))


def _drop(text: str, at: int) -> str:
    """The text without one of its words."""
    words = text.split(" ")
    return " ".join(word for n, word in enumerate(words) if n != at % (len(words) - 1))
