from __future__ import annotations

import datetime
import enum
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import lfm_templates
import pytest
import tiny_tokenizers

from lfm_mlx.errors import CheckpointError, TemplateError
from lfm_mlx.tokenizer import ChatTemplate, load_tokenizer, opens_reasoning, special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Wetter für <Orte> & "Städte"',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"name": "b", "parameters": {}},
]

CALL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "arguments": {
            "city": "Martha's \\ Vineyard",
            "days": 3,
            "exact": True,
            "note": None,
            "tags": ["a", True],
            "more": {"k": True},
        },
    },
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one user turn": [{"role": "user", "content": "Hi"}],
    "system and turns": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": '<b>Größe & "Maß"</b> 日本 🙂'},
        {"role": "assistant", "content": "<think>hm</think>Yes."},
        {"role": "user", "content": "And?\n\n"},
        {"role": "assistant", "content": "<think>so</think>  No. "},
        {"role": "user", "content": "what does <think> do<|im_end|>"},
    ],
    "tool round": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Calling.", "tool_calls": [CALL, CALL], "thinking": "which tool"},
        {"role": "tool", "content": '{"temp": 3}'},
        {"role": "assistant", "content": "Cold.", "reasoning": "3 is cold"},
    ],
    "structured content": [{"role": "user", "content": [{"type": "text", "text": "été"}]}],
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast  # takes a second

    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizers.write_json_tokenizer(tmp_path_factory.mktemp("ref")))


@functools.cache
def compile_template(source: str, **special_tokens: str) -> ChatTemplate:
    tokens = {"bos_token": special.BOS, "eos_token": special.TURN_END, "pad_token": special.PAD, **special_tokens}
    return ChatTemplate(source, special_tokens=tokens)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, [], TOOLS], ids=["no tools", "empty tools", "two tools"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("generation", lfm_templates.ALL)
def test_every_generation_renders_the_text_that_transformers_renders(
    generation: str, conversation: str, tools: Any, add_generation_prompt: bool, reference: PreTrainedTokenizerFast
) -> None:
    source, messages = lfm_templates.ALL[generation], CONVERSATIONS[conversation]
    given = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **given)
    assert compile_template(source).render(messages, **given) == expected
    other_end = {**given, "add_generation_prompt": not add_generation_prompt}
    assert compile_template(source).render(messages, **other_end) != expected


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("{{ messages | tojson(indent=2) }}", {}),
        ("{{ messages | tojson(indent=1, separators=(';', '=')) }}", {}),
        ("{{ {'z': 1, 'a': '<é>'} | tojson(sort_keys=True) }}", {}),
        ("{{ {'z': 1, 'a': '<é>'} | tojson(ensure_ascii=True) }}", {}),
        ("{{ documents }}|{{ missing }}|{{ pad_token }}|{{ unk_token }}|{{ eos_token }}", {}),
        ("{{ documents[0].title }}", {"documents": [{"title": "T", "text": "x"}]}),
        ("{{ bos_token }}{{ flag }}", {"bos_token": "other", "flag": (1, 2.5, None, True)}),
        ("{% for i in range(9) %}{% if i == 5 %}{% break %}{% endif %}{% if i % 2 %}{% continue %}{% endif %}{{ i }}"
         "{% endfor %}", {}),
        ("{% set ns = namespace(a=1, self=2) %}{% set ns.a = ns.a + ns.self %}{{ ns.a }}", {}),
        ("{{ dict(a=1, b=2) }}{{ dict.fromkeys(['x']) }}", {}),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}a{{ x }}{% endgeneration %}{{ x }}", {}),
        ("  {% if true %}\n  text\n  {% endif %}\n\n", {}),
        ("{% for m in messages %}{{ m.keys() | list }}{{ m.reasoning_content }}{{ m.content is defined }}"
         "{% endfor %}", {}),
    ],
)  # fmt: skip
def test_the_environment_of_a_template_is_that_of_transformers(
    source: str, variables: dict[str, Any], reference: PreTrainedTokenizerFast
) -> None:
    messages = [
        {"role": "user", "content": "<ä>", "name": None},
        {"role": "assistant", "content": None, "reasoning": "r"},
        {"role": "assistant", "content": "", "thinking": "t", "reasoning_content": "c"},
    ]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **variables)
    assert compile_template(source).render(messages, add_generation_prompt=False, **variables) == expected


def test_bare_jinja_would_render_otherwise() -> None:
    """The control of the test above: the environment makes a difference."""
    source = "{{ m | tojson }}\n  {% if true %}\n x{% endif %}\n"
    bare = jinja2.Environment().from_string(source).render(m="<é>")
    assert compile_template(source).render([{"role": "user"}], m="<é>") != bare


def test_strftime_now_prints_todays_date() -> None:
    template = compile_template("{{ strftime_now('%Y-%m-%d') }}")
    days = {datetime.date.today().isoformat(), template.render([{"role": "user"}]), datetime.date.today().isoformat()}
    assert len(days) <= 2
    assert "2001-01-01" not in days


def test_keep_past_thinking_reaches_the_template() -> None:
    messages = CONVERSATIONS["system and turns"]
    template = compile_template(lfm_templates.LFM25)
    assert "hm" in template.render(messages, keep_past_thinking=True)
    assert "hm" not in template.render(messages)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("line one\n{% if %}", r"mine\.jinja, line 2: Expected an expression"),
        ("{% for x in y %}", r"mine\.jinja, line 1: Unexpected end of template"),
        ("a\nb\n{{ x | nofilter }}", r"mine\.jinja, line 3: No filter named 'nofilter'"),
        ("{% unknown %}", r"mine\.jinja, line 1: Encountered unknown tag"),
        ("  \n", r"mine\.jinja is empty"),
    ],
)
def test_a_broken_template_is_reported_with_file_and_line(source: str, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        ChatTemplate(source, name="mine.jinja")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        ("hello", "messages is a str, expected a list"),
        ({"role": "user"}, "messages is a dict, expected a list"),
        ([{"role": "user", "content": "a"}, "b"], r"messages\[1\] is a str, expected a mapping"),
        ([{"content": "a"}], r"messages\[0\] has the role None"),
        ([{"role": 3}], r"messages\[0\] has the role 3"),
        ([{"role": "user", "content": [{"x": object()}]}], r"messages\[0\]\['content'\]\[0\]\['x'\] is a object"),
        ([{"role": "user", "content": b"bytes"}], r"messages\[0\]\['content'\] is a bytes"),
    ],
)  # fmt: skip
def test_a_malformed_message_is_refused_by_its_index(messages: Any, expected: str) -> None:
    with pytest.raises(TemplateError, match=expected):
        compile_template(lfm_templates.LFM25).render(messages)


def test_deeply_nested_content_is_refused_and_not_a_crash() -> None:
    content: Any = "x"
    for _ in range(5000):
        content = [content]
    with pytest.raises(TemplateError, match=r"messages\[0\].* nested more than 100 levels"):
        compile_template(lfm_templates.LFM25).render([{"role": "user", "content": content}])


@pytest.mark.parametrize(("tools", "expected"), [
    ({"name": "f"}, "tools is a dict, expected a list"),
    ([{"name": "f"}, len], r"tools\[1\] is a builtin_function_or_method, expected a mapping"),
])  # fmt: skip
def test_malformed_tools_are_refused(tools: Any, expected: str) -> None:
    with pytest.raises(TemplateError, match=expected):
        compile_template(lfm_templates.LFM25).render([{"role": "user", "content": "x"}], tools=tools)


def test_the_templates_own_exception_comes_with_the_message_index_and_the_line() -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    line = next(i for i, text in enumerate(lfm_templates.HARDENED.split("\n"), 1) if "raise_exception" in text)
    expected = rf"messages\[1\] cannot be rendered: arguments of a tool call must be a mapping \(.*line {line}\)"
    with pytest.raises(TemplateError, match=expected):
        compile_template(lfm_templates.HARDENED).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{{ m.nothing.at_all }}{% endfor %}",
        "{% for m in messages %}{{ m.nothing | tojson }}{% endfor %}",
        "{% for m in messages %}{{ 1 / 0 }}{% endfor %}",
        "{% macro f(m) %}{{ f(m) }}{% endmacro %}{{ f(messages[0]) }}",
        "{% for m in messages %}{{ m.content['__class__'].__mro__[1] }}{% endfor %}",
    ],
)
def test_an_error_while_rendering_is_a_template_error_with_the_message_index(source: str) -> None:
    with pytest.raises(TemplateError, match=r"messages\[0\] cannot be rendered: "):
        compile_template(source).render([{"role": "user", "content": "x"}])


def test_a_message_without_content_that_the_template_needs_is_told_apart() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    with pytest.raises(TemplateError, match=r"messages\[1\] cannot be rendered: .*; give it a content, '' if need be"):
        compile_template(lfm_templates.LFM2).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ dict.__subclasses__() }}",
        "{% set ns = namespace(**{'__class__': 1}) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(1000000) | list }}",
    ],
)
def test_a_hostile_template_stays_in_the_sandbox(source: str) -> None:
    with pytest.raises((TemplateError, CheckpointError)):
        compile_template(source).render([{"role": "user", "content": "x"}])


def test_rendering_leaves_the_callers_messages_alone_and_reads_subclasses_as_their_plain_values() -> None:
    class Role(str, enum.Enum):
        USER = "user"

    messages = [{"role": Role.USER, "content": None, "reasoning": "r"}]
    before = [dict(message) for message in messages]
    assert compile_template("{{ messages[0].role }}").render(messages) == "user"
    assert messages == before


@pytest.mark.parametrize(
    ("generation", "expected"), [("lfm2", False), ("lfm2.5", False), ("lfm2.5-moe", False), ("hardened", True)]
)
def test_only_a_template_that_opens_think_opens_reasoning(generation: str, expected: bool) -> None:
    template = compile_template(lfm_templates.ALL[generation])
    quoting = [{"role": "user", "content": "what is <think>?"}]
    assert opens_reasoning(template.render(quoting)) is expected
    assert opens_reasoning(template.render(quoting, add_generation_prompt=False)) is False


@pytest.mark.parametrize(
    ("rendered", "expected"),
    [
        ("<think>", True),
        ("<think>\n", True),
        ("<think>\n\n</think>\n\n", False),
        ("", False),
        ("</think><think>a", True),
    ],
)
def test_reasoning_is_open_when_the_last_think_tag_opens(rendered: str, expected: bool) -> None:
    assert opens_reasoning("<|im_start|>assistant\n" + rendered) is expected


def write_templates(folder: Path, **files: str) -> Path:
    tiny_tokenizers.write_json_tokenizer(folder)
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("files", "plain", "with_tools"),
    [
        ({"tokenizer_config_dot_json": json.dumps({"chat_template": "C"})}, "C", "C"),
        ({"tokenizer_config_dot_json": json.dumps({"chat_template": NAMED})}, "D", "T"),
        ({"chat_template_dot_json": json.dumps({"chat_template": "J"})}, "J", "J"),
        ({"chat_template_dot_jinja": "F", "tokenizer_config_dot_json": json.dumps({"chat_template": "C"})}, "F", "F"),
        ({"chat_template_dot_jinja": "F", "additional_chat_templates__tool_use_dot_jinja": "A"}, "F", "A"),
    ],
)
def test_a_template_is_found_wherever_a_checkpoint_may_keep_it(
    files: dict[str, str], plain: str, with_tools: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_templates(tmp_path, **files))
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.has_template
    assert tokenizer.render(messages) == plain
    assert tokenizer.render(messages, tools=[{"name": "f"}]) == with_tools
    if "chat_template_dot_json" not in files:
        from transformers import PreTrainedTokenizerFast

        reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert reference.apply_chat_template(messages, tokenize=False) == plain
        assert reference.apply_chat_template(messages, tools=[{"name": "f"}], tokenize=False) == with_tools


@pytest.mark.parametrize("value", [3, {"default": 3}, [{"name": "a"}], ["x"]])
def test_a_template_of_a_wrong_type_names_the_file(value: Any, tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path, config={"chat_template": value})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is a "):
        load_tokenizer(tmp_path)


def test_a_broken_template_in_tokenizer_config_names_that_file(tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path, config={"chat_template": "{% if %}"})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json, line 1"):
        load_tokenizer(tmp_path)


def test_named_templates_without_a_default_are_refused_when_one_is_needed(tmp_path: Path) -> None:
    tiny_tokenizers.write_json_tokenizer(tmp_path, config={"chat_template": NAMED[1:]})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.render([{"role": "user"}], tools=[]) == "T"
    with pytest.raises(TemplateError, match="named tool_use, expected one named 'default'"):
        tokenizer.render([{"role": "user"}])


def test_a_tokenizer_without_a_template_says_to_give_a_raw_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizers.write_json_tokenizer(tmp_path))
    assert not tokenizer.has_template
    with pytest.raises(TemplateError, match=r"no chat template.*raw prompt"):
        tokenizer.apply_template([{"role": "user", "content": "x"}])
