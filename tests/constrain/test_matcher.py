from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from drawing import accepts, accepts_text, answers, draw, read_pythonic
from tool_cases import EVENT, OPTIONAL, WEATHER

from lfm_mlx.bench.mask_time import allowed_ids
from lfm_mlx.constrain import (
    Choice,
    Constraint,
    GrammarTokenizer,
    JsonObject,
    JsonSchema,
    Lark,
    Matcher,
    Regex,
    ToolCalls,
)
from lfm_mlx.constrain.reason import one_line
from lfm_mlx.errors import OptionError
from lfm_mlx.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}
CALL = "<|tool_call_start|>[optional(a=1)]<|tool_call_end|>"
TOOLS = [OPTIONAL, WEATHER]
CONSTRAINTS: list[Constraint] = [
    JsonSchema(SCHEMA, reasoning="forbidden"),
    Regex("[a-z]{2,5}( [0-9]+)?", reasoning="forbidden"),
    Choice(["yes", "no", "not at all"], reasoning="forbidden"),
    ToolCalls(TOOLS, tool_choice="required", reasoning="forbidden"),
    ToolCalls(TOOLS),
    ToolCalls(TOOLS, tool_choice="none"),
    JsonObject(reasoning="required"),
]


def start(constraint: Constraint, vocabulary: GrammarTokenizer, text: str, tokenizer: Tokenizer) -> Matcher:
    """A matcher that has read `text`."""
    matcher = Matcher(constraint, vocabulary)
    for token_id in tokenizer.encode(text, add_bos=False):
        matcher.accept(token_id)
    return matcher


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_the_stop_token_is_allowed_exactly_where_the_answer_is_complete(
    constraint: Constraint, vocabulary: GrammarTokenizer
) -> None:
    was_complete = set()
    for seed in range(5):
        matcher = Matcher(constraint, vocabulary)
        for token_id in draw(Matcher(constraint, vocabulary), vocabulary, np.random.default_rng(seed)).ids:
            allowed = set(allowed_ids(matcher.mask()))
            assert (vocabulary.stop_ids <= allowed) is matcher.is_complete
            assert bool(vocabulary.stop_ids & allowed) is matcher.is_complete
            assert all(matcher.allows(stop) is matcher.is_complete for stop in vocabulary.stop_ids)
            was_complete.add(matcher.is_complete)
            matcher.accept(token_id)
    assert False in was_complete or constraint.is_lazy


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_mask_and_allows_and_accept_agree(constraint: Constraint, vocabulary: GrammarTokenizer) -> None:
    matcher = Matcher(constraint, vocabulary)
    for token_id in draw(Matcher(constraint, vocabulary), vocabulary, np.random.default_rng(3), max_tokens=12).ids:
        allowed = set(allowed_ids(matcher.mask()))
        for other in range(0, vocabulary.vocab_size, 7):
            assert matcher.allows(other) is (other in allowed)
            is_piece = any(is_prefix(vocabulary, other, one) for one in allowed)
            if other not in allowed and not is_piece:
                with pytest.raises(OptionError, match="is not allowed"):
                    matcher.accept(other)
        matcher.accept(token_id)


def test_ids_without_text_are_never_allowed(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    for constraint in CONSTRAINTS:
        allowed = allowed_ids(Matcher(constraint, vocabulary).mask())
        assert len(allowed)
        assert allowed.max() < tokenizer.vocab_size
        assert not Matcher(constraint, vocabulary).allows(vocabulary.vocab_size)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_after_a_rollback_it_goes_on_like_one_that_never_went_further(
    constraint: Constraint, vocabulary: GrammarTokenizer
) -> None:
    rng = np.random.default_rng(5)
    ids = [*draw(Matcher(constraint, vocabulary), vocabulary, rng, max_tokens=40).ids]
    matcher = Matcher(constraint, vocabulary)
    for token_id in ids:
        matcher.accept(token_id)
    if matcher.is_complete:
        ids.append(min(vocabulary.stop_ids))
        matcher.accept(ids[-1])
    for kept in (len(ids) - 1, len(ids) * 2 // 3, len(ids) // 2, 1, 0):
        matcher.rollback(matcher.num_tokens - kept)
        fresh = Matcher(constraint, vocabulary)
        for token_id in ids[:kept]:
            fresh.accept(token_id)
        assert np.array_equal(matcher.mask(), fresh.mask())
        assert matcher.is_complete == fresh.is_complete
        assert matcher.num_tokens == kept
    for token_id in ids:
        matcher.accept(token_id)
    with pytest.raises(OptionError, match="num_tokens is"):
        matcher.rollback(len(ids) + 1)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=repr)
def test_a_copy_goes_on_alone(constraint: Constraint, vocabulary: GrammarTokenizer) -> None:
    ids = draw(Matcher(constraint, vocabulary), vocabulary, np.random.default_rng(8), max_tokens=30).ids
    matcher = Matcher(constraint, vocabulary)
    for token_id in ids[: len(ids) // 2]:
        matcher.accept(token_id)
    before = matcher.mask().copy()
    copy = matcher.copy()
    for token_id in ids[len(ids) // 2 :]:
        copy.accept(token_id)
    copy.rollback(len(ids))
    assert np.array_equal(matcher.mask(), before)
    assert matcher.num_tokens == len(ids) // 2


@pytest.mark.parametrize(
    "constraint", [*CONSTRAINTS[:4], JsonSchema({"const": {"a": "é", "b": ["<|im_end|>"]}})], ids=repr
)
def test_forced_tokens_are_the_only_possibility(
    constraint: Constraint, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    matcher = Matcher(constraint, vocabulary)
    num_forced = 0
    if constraint.reasoning == "optional":
        matcher.accept(min(set(allowed_ids(matcher.mask())) - {vocabulary.marker("<think>")}))
    for seed in range(40):
        forced = matcher.forced()
        num_forced += len(forced)
        for token_id in forced:
            expected = vocabulary.token_bytes[token_id]
            for other in allowed_ids(matcher.mask()):
                # What else is allowed is only the same text in other pieces.
                text = vocabulary.token_bytes[int(other)]
                assert text.startswith(expected[:1])
            matcher.accept(token_id)
        if matcher.is_complete:
            break
        allowed = allowed_ids(matcher.mask())
        matcher.accept(int(np.random.default_rng(seed).choice(allowed)))
    assert num_forced or isinstance(constraint, Regex)


def test_forced_tokens_are_those_the_tokenizer_would_write(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    text = '{"name": "get_weather", "city": "Paris", "note": "the quick brown fox"}'
    matcher = Matcher(Lark(f"start: {json.dumps(text)}", reasoning="forbidden"), vocabulary)
    ids: list[int] = []
    while not matcher.is_complete:
        forced = matcher.forced() or [int(allowed_ids(matcher.mask())[0])]
        for token_id in forced:
            matcher.accept(token_id)
        ids += forced
    assert ids == tokenizer.encode(text, add_bos=False)
    stepwise = accepts_text(matcher.constraint, vocabulary, tokenizer, text)
    assert stepwise


def test_the_text_of_a_special_token_stays_text(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    constraint = Choice(["<|im_end|>!"], reasoning="forbidden")
    matcher = Matcher(constraint, vocabulary)
    assert not matcher.is_complete
    while not matcher.is_complete:
        forced = matcher.forced() or [int(allowed_ids(matcher.mask())[0])]
        assert not set(forced) & vocabulary.special_ids
        for token_id in forced:
            matcher.accept(token_id)


@pytest.mark.parametrize(
    ("options", "text", "is_accepted"),
    [
        ({}, "hello", True),
        ({}, CALL, True),
        ({}, f"hello {CALL} bye", True),
        ({}, f"{CALL}{CALL}", True),
        ({}, f"<think>hm</think>{CALL}", True),
        ({}, f"<think>hm</think>\n\nhello{CALL}", True),
        ({}, "<think>hm", False),
        ({}, "<think>hm</think>", True),
        ({}, "hello <think>hm</think>", False),
        ({}, "hello</think>", False),
        ({}, f"<think>{CALL}</think>", False),
        ({}, "<|tool_call_start|>[optional(a=1)]", False),
        ({}, "<|tool_call_start|>[nothing(a=1)]<|tool_call_end|>", False),
        ({}, "<|tool_call_end|>", False),
        ({}, "<|im_start|>user", False),
        ({"is_parallel": False}, f"a {CALL} b", True),
        ({"is_parallel": False}, f"a {CALL} b {CALL}", False),
        ({"tool_choice": "none"}, "hello", True),
        ({"tool_choice": "none"}, f"hello {CALL}", False),
        ({"tool_choice": "required"}, CALL, True),
        ({"tool_choice": "required"}, f"<think>hm</think>{CALL}", True),
        ({"tool_choice": "required"}, f"<think>hm</think>\n{CALL}", True),
        ({"tool_choice": "required"}, f"<think>hm</think>\n\n{CALL}", True),
        ({"tool_choice": "required"}, f"<think>hm</think>ok{CALL}", False),
        ({"tool_choice": "required"}, f"\n{CALL}", False),
        ({"tool_choice": "required"}, "hello", False),
        ({"tool_choice": "required"}, f"{CALL} done", False),
        ({"tool_choice": "get_weather"}, CALL, False),
        ({"tool_choice": "required", "reasoning": "required"}, CALL, False),
        ({"tool_choice": "required", "reasoning": "required"}, f"<think></think>{CALL}", True),
        ({"tool_choice": "required", "reasoning": "forbidden"}, f"<think></think>{CALL}", False),
    ],
)
def test_tool_choice_and_reasoning_say_what_an_answer_may_be(
    options: dict[str, Any], text: str, is_accepted: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    assert accepts_text(ToolCalls(TOOLS, **options), vocabulary, tokenizer, text) is is_accepted


def test_without_tools_there_is_no_call(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    assert accepts_text(ToolCalls([]), vocabulary, tokenizer, "hello")
    assert not accepts_text(ToolCalls([]), vocabulary, tokenizer, "<|tool_call_start|>")


def test_a_prompt_that_opened_the_reasoning_is_continued_within_it(
    vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    matcher = Matcher(JsonObject(), vocabulary, is_in_reasoning=True)
    assert matcher.is_reasoning
    assert matcher.is_free
    for token_id in tokenizer.encode("hm</think>\n{}", add_bos=False):
        assert not matcher.is_complete
        matcher.accept(token_id)
    assert matcher.is_complete
    closed = Matcher(JsonObject(reasoning="forbidden"), vocabulary, is_in_reasoning=True)
    assert closed.forced() == [vocabulary.marker("</think>")]
    assert list(allowed_ids(closed.mask())) == closed.forced()


@pytest.mark.parametrize("marker", ["<think>", "</think>", "<|tool_call_start|>", "<|tool_call_end|>"])
@pytest.mark.parametrize("reasoning", [True, False])
def test_free_text_never_spells_a_marker(
    marker: str, reasoning: bool, vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    pieces = [tokenizer.encode(character, add_bos=False)[0] for character in marker]
    matcher = Matcher(ToolCalls(TOOLS), vocabulary, is_in_reasoning=reasoning)
    for token_id in [*tokenizer.encode("a <", add_bos=False), *pieces[:-1]]:
        matcher.accept(token_id)
    assert not matcher.allows(pieces[-1])
    assert not any(
        vocabulary.token_bytes[int(other)].startswith(b">")
        for other in allowed_ids(matcher.mask())
        if int(other) not in vocabulary.special_ids
    )
    matcher.accept(pieces[0])
    assert matcher.allows(pieces[-1])


def test_a_lazy_start_masks_like_one_grammar_for_the_whole_answer(
    vocabulary: GrammarTokenizer, tokenizer: Tokenizer
) -> None:
    lazy = ToolCalls([OPTIONAL], reasoning="forbidden", is_parallel=False)
    start_id, end_id = (vocabulary.marker(text) for text in ("<|tool_call_start|>", "<|tool_call_end|>"))
    spelled = "|".join(("<think>", "<\\/think>", "<\\|tool_call_start\\|>", "<\\|tool_call_end\\|>"))
    eager = Lark(
        f"start: TEXT (<[{start_id}]> calls <[{end_id}]> TEXT)?\n"
        f"TEXT: /(?s:.*)/ & ~/(?s:.*)({spelled})(?s:.*)/\n{lazy._block}",
        reasoning="forbidden",
    )
    first, second = Matcher(lazy, vocabulary), Matcher(eager, vocabulary)
    for token_id in tokenizer.encode(f"so: {CALL} <|tool_call_ done", add_bos=False):
        free = {vocabulary.token_bytes[other] for other in allowed_ids(first.mask())}
        ruled = {vocabulary.token_bytes[other] for other in allowed_ids(second.mask())}
        # Free text may hold pieces of characters in any order; a grammar reads UTF-8.
        assert ruled <= free
        assert all(not is_text(token) for token in free - ruled)
        assert first.is_complete == second.is_complete
        first.accept(token_id)
        second.accept(token_id)


def is_prefix(vocabulary: GrammarTokenizer, token_id: int, whole: int) -> bool:
    """Whether a token spells the beginning of another one."""
    token = vocabulary.token_bytes[token_id]
    return bool(token) and vocabulary.token_bytes[whole].startswith(token)


def is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_drawn_text_with_calls_has_valid_calls(vocabulary: GrammarTokenizer) -> None:
    pattern = re.compile(r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", re.DOTALL)
    constraint = ToolCalls([OPTIONAL, EVENT])
    start_id = vocabulary.marker("<|tool_call_start|>")
    num_calls = 0
    for seed in range(10):
        matcher = Matcher(constraint, vocabulary)
        answer = draw(matcher, vocabulary, np.random.default_rng(seed), max_tokens=5)
        if matcher.is_stopped or start_id in answer.ids:
            continue
        assert start_id is not None
        matcher.accept(start_id)
        answer = draw(matcher, vocabulary, np.random.default_rng(seed), max_tokens=300)
        for block in pattern.findall("<|tool_call_start|>" + answer.text):
            num_calls += len(read_pythonic(block))
    assert num_calls > 5


def test_an_answer_that_is_cut_off_is_not_complete(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    matcher = start(JsonSchema(SCHEMA), vocabulary, '{"a": 1', tokenizer)
    assert not matcher.is_complete
    assert not matcher.is_stopped
    matcher.accept(tokenizer.encode("}", add_bos=False)[0])
    assert matcher.is_complete
    assert matcher.is_stopped


def test_a_vocabulary_without_markers_is_refused_where_they_are_needed(
    vocabulary: GrammarTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarTokenizer, "marker", lambda self, text: None)
    with pytest.raises(OptionError, match=r"no token <.tool_call_start.>"):
        Matcher(ToolCalls(TOOLS), vocabulary)
    with pytest.raises(OptionError, match="no <think>"):
        Matcher(JsonObject(reasoning="required"), vocabulary)
    Matcher(JsonObject(), vocabulary)


def test_regexes_and_choices_match_the_whole_answer(vocabulary: GrammarTokenizer) -> None:
    pattern = r"[A-Z][a-z]+(, (yes|no|\d{2,3}))*\.?"
    for answer in answers(Regex(pattern, reasoning="forbidden"), vocabulary, 200, share=0.3):
        assert re.fullmatch(pattern, answer.text)
    assert all(answer.text.isascii() for answer in answers(Regex(r"\d+", reasoning="forbidden"), vocabulary, 20))
    options = ["yes", "no", 'qu"ote\\', "new\nline", "日本語", "a/b"]
    drawn = {answer.text for answer in answers(Choice(options, reasoning="forbidden"), vocabulary, 200)}
    assert drawn == set(options)


@pytest.mark.parametrize(
    "constraint",
    [
        Choice([f"label {number}" for number in range(4000)], reasoning="forbidden"),
        JsonSchema({"properties": {f"p{n}": {"type": "string"} for n in range(900)}}, reasoning="forbidden"),
    ],
    ids=["choices", "properties"],
)
def test_a_constraint_may_branch_widely(constraint: Constraint, vocabulary: GrammarTokenizer) -> None:
    for answer in answers(constraint, vocabulary, 2):
        assert answer.text


def test_the_answer_after_reasoning_is_constrained(vocabulary: GrammarTokenizer) -> None:
    for answer in answers(JsonSchema(SCHEMA, reasoning="required"), vocabulary, 30, max_tokens=150):
        assert answer.text.startswith("<think>")
        _, _, text = answer.text.partition("</think>")
        assert "</think>" not in text
        assert isinstance(json.loads(text)["a"], int)


def _chain(num_rules: int) -> str:
    rules = [f"r{number}: r{number + 1}" for number in range(num_rules)]
    return "\n".join(["start: r0", *rules, f'r{num_rules}: "a"'])


def test_a_grammar_may_lead_through_many_rules(vocabulary: GrammarTokenizer) -> None:
    assert Matcher(Lark(_chain(200)), vocabulary)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Regex("(?=a)"), "look-around"),
        (lambda: Regex("("), "unclosed"),
        (lambda: Regex(""), "pattern is ''"),
        (lambda: Choice([]), "options is []"),
        (lambda: Choice("ab"), "options is 'ab'"),
        (lambda: Choice(["a", ""]), "an option is ''"),
        (lambda: Lark("no rule"), "source is refused"),
        (lambda: Lark(f'start: "{"a" * 250_000}"'), "250,009 characters"),
        (lambda: Regex("a" * 250_001), "250,001 characters"),
        (lambda: Choice(["a" * 250_000, "b"]), "250,001 characters"),
        (lambda: JsonSchema({"enum": ["a" * 250_000]}), "250,014 characters"),
        (lambda: Lark("begin: /a/"), "start"),
        (lambda: Lark("start: x"), "unknown name"),
        (lambda: Lark("x"), "source is refused"),
        (lambda: Lark('start: a\na[stop="x"]: /.*/'), "'stop'"),
        (lambda: Lark("start: a\na[max_tokens=3]: /.*/"), "'max_tokens'"),
        (lambda: Lark('start: %json {"not": {}}'), "not"),
        (lambda: Lark(f'start: %json {{"const": {-(2**63)}}}'), "%json#/const"),
        (lambda: Lark(_chain(5000)), "300 levels deep"),
    ],
)
def test_what_is_no_grammar_is_refused(make: Any, expected: str) -> None:
    with pytest.raises(OptionError) as caught:
        make()
    assert expected in str(caught.value)


def test_a_refusal_is_short_whatever_was_asked_for() -> None:
    with pytest.raises(OptionError, match=r"is refused: .* invalid regex") as caught:
        Regex("(" * 5000)
    assert len(str(caught.value)) < 600
    assert one_line("panic: too large\n<backtrace>\n 0: start", "and more") == "panic: too large and more"


def test_an_unknown_special_token_is_refused_by_the_matcher(vocabulary: GrammarTokenizer) -> None:
    with pytest.raises(OptionError, match="nowhere"):
        Matcher(Lark('start: <|nowhere|> "a"'), vocabulary)


@pytest.mark.parametrize("pattern", ["a$b", "[^\\s\\S]"])
def test_a_grammar_that_matches_nothing_is_refused(pattern: str, vocabulary: GrammarTokenizer) -> None:
    with pytest.raises(OptionError, match=r"matches nothing|refused"):
        Matcher(Regex(pattern), vocabulary)


def test_a_grammar_may_name_special_tokens(vocabulary: GrammarTokenizer, tokenizer: Tokenizer) -> None:
    constraint = Lark('start: "a" <|tool_call_start|> "b"', reasoning="forbidden")
    assert accepts_text(constraint, vocabulary, tokenizer, "a<|tool_call_start|>b")
    spelled = [
        token for text in ("a", "<|", "tool_call_start|>", "b") for token in tokenizer.encode(text, add_bos=False)
    ]
    assert not accepts(constraint, vocabulary, spelled)
