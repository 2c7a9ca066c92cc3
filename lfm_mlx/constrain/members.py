"""Arguments, properties and items in their order, with commas between them."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_mlx.constrain.lark_rules import LarkRules, either, glued, pattern

COMMA, COLON = "COMMA", "COLON"
SEPARATORS = f"{COMMA}:{pattern(', ?')}\n{COLON}:{pattern(': ?')}"
"""The lines that go with every grammar written here; names are read faster than the expressions again and again."""


Member = tuple[str, bool]
"""The body of a key with its value, and whether it must be there."""

# What is short is cheaper written twice than as a rule.
_SHARED_FOLLOWERS = 3


def sequence(rules: LarkRules, head: str, members: Sequence[Member], tail: str) -> str:
    """The body for members in this order, separated by commas, between `head` and `tail`."""
    first = next((index for index, (_, is_required) in enumerate(members) if is_required), None)
    if first is None:
        opening = f"({either(_openings(rules, members))})?" if members else ""
        return joined(rules, head, opening, tail)
    body = members[first][0]
    for text, is_required in members[first + 1 :]:
        body = glued(body, _after_comma(rules, text) + ("" if is_required else "?"))
    for text, _ in reversed(members[:first]):
        # What stands before the first required member brings its own comma.
        body = f"({glued(text, COMMA)})?{body}"
    return joined(rules, head, body, tail)


def joined(rules: LarkRules, head: str, body: str, tail: str) -> str:
    """Three bodies glued; within terminals, strings side by side become one."""
    if not rules.is_regular:
        return glued(glued(head, body), tail)
    text = head[:-1] + body[1:] if head[-1:] == body[:1] == '"' else glued(head, body)
    return text[:-1] + tail[1:] if text[-1:] == tail[:1] == '"' else glued(text, tail)


def _after_comma(rules: LarkRules, text: str) -> str:
    return rules.rule(glued(COMMA, text))


def _openings(rules: LarkRules, members: Sequence[Member]) -> list[str]:
    """Each way to begin where all members are optional; the ends are shared."""
    bodies: list[str] = []
    rest = ""
    for text, _ in reversed(members):
        bodies.append(glued(text, rest))
        rest = glued(f"{_after_comma(rules, text)}?", rest)
        if len(bodies) % _SHARED_FOLLOWERS == 0:
            rest = rules.rule(rest)
    return bodies[::-1]


def repeats(low: int, high: int | None) -> str:
    """The sign for that many repeats."""
    if low == 0 and high in (None, 1):
        return "*" if high is None else "?"
    return f"{{{low},{'' if high is None else high}}}"
