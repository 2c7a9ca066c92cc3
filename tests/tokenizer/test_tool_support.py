import json
import logging
import shutil
from pathlib import Path

import pytest

from lfm_mlx.load import load
from lfm_mlx.tokenizer import load_tokenizer, tool_problems

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture
def changed(tmp_path):
    """A copy of the tiny checkpoint whose files may be changed."""
    return shutil.copytree(TINY, tmp_path / "tiny")


def problems_of(folder, vocab_size=128_000):
    return tool_problems(load_tokenizer(folder), vocab_size)


def test_a_tokenizer_with_its_markers_and_a_template_with_tools_has_no_problem():
    assert problems_of(TINY) == []


def test_a_marker_that_is_no_special_token_is_told(changed):
    raw = json.loads((changed / "tokenizer.json").read_text())
    for token in raw["added_tokens"]:
        token["special"] = token["special"] and token["content"] != "<|tool_call_start|>"
    (changed / "tokenizer.json").write_text(json.dumps(raw))
    (problem,) = problems_of(changed)
    assert problem.startswith("the tokenizer does not know <|tool_call_start|> as special")
    assert problems_of(changed, vocab_size=1344) == []


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no tools') }}"]
)
def test_a_template_that_cannot_show_tools_is_told_at_load_too(changed, caplog, template):
    (changed / "chat_template.jinja").write_text(template)
    (problem,) = problems_of(changed)
    assert "template does not show tools" in problem
    with caplog.at_level(logging.WARNING):
        load(changed)
    assert [record.getMessage() for record in caplog.records] == [f"{changed}: {problem}"]
