import json
import math
from pathlib import Path
from xml.etree import ElementTree

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from lfm_mlx.convert import convert
from lfm_mlx.convert.__main__ import command
from lfm_mlx.convert.agreement import agreement_of, compare_answers, greedy
from lfm_mlx.convert.divergence import Scored, measure_divergence
from lfm_mlx.convert.layerwise import Layerwise
from lfm_mlx.convert.manifest import add_to_manifest, check_manifest
from lfm_mlx.convert.quality import FILES, measure_quality, read_set, write_report
from lfm_mlx.errors import ConversionError, OptionError
from lfm_mlx.load import load

TINY = Path(__file__).parents[2] / "examples" / "tiny"
LANGUAGES = {"ar", "de", "en", "es", "fr", "ja", "ko", "pt", "zh"}
IDS = (1, 5, 9, 77, 3, 2, 14, 60, 61, 9, 9, 100)


@pytest.fixture(scope="module")
def small_set():
    """A little of the evaluation set, so that a report takes seconds."""
    given = read_set()
    return {"texts": [{"text": given["texts"][0]["text"][:100]}], "conversations": given["conversations"][:2]}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Conversions of the trained checkpoint in 2, 4 and 8 bits."""
    parent = tmp_path_factory.mktemp("converted")
    return {bits: convert(TINY, parent / str(bits), recipe=f"{bits}bit").folder for bits in (2, 4, 8)}


def test_the_set_has_the_nine_languages_in_texts_and_conversations():
    given = read_set()
    assert {item["language"] for item in given["texts"]} == LANGUAGES
    assert {item["language"] for item in given["conversations"]} == LANGUAGES
    assert all(item["tools"] for item in given["conversations"])


def test_a_forward_pass_by_layers_is_the_models_own(kind, sources):
    model, _ = load(sources[kind])
    layerwise = Layerwise(sources[kind])
    made = mx.concatenate(list(layerwise.logits(layerwise.run([IDS]))))
    np.testing.assert_allclose(np.array(made), np.array(model(mx.array([IDS]))[0]), atol=1e-5)


def test_divergence_is_what_the_definitions_say(converted):
    source, other = load(TINY)[0], load(converted[2])[0]
    start = 3
    found = measure_divergence(Layerwise(TINY), Layerwise(converted[2]), [[Scored(ids=IDS, start=start)]])
    a, b = (np.array(model(mx.array([IDS]))[0], np.float64)[start - 1 : -1] for model in (source, other))
    log_a, log_b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    divergence = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    (prediction,) = found.predictions
    assert prediction.num_tokens == len(IDS) - start
    assert prediction.kl_mean == pytest.approx(divergence.mean(), rel=1e-3)
    assert prediction.kl_p99 == pytest.approx(np.percentile(divergence, 99), rel=1e-3)
    assert prediction.top1_agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    chosen = log_b[np.arange(len(b)), IDS[start:]]
    assert prediction.perplexity == pytest.approx(math.exp(-chosen.mean()), rel=1e-3)


def test_fewer_bits_are_further_away(converted):
    source = Layerwise(TINY)
    found = {bits: measure_divergence(source, Layerwise(out), [[Scored(ids=IDS)]]) for bits, out in converted.items()}
    divergences = {bits: each.predictions[0].kl_mean for bits, each in found.items()}
    assert divergences[8] < divergences[4] / 5 < divergences[2] / 5
    assert found[8].layers[-1].error < found[2].layers[-1].error
    changed = [layer.changed_experts for layer in found[2].layers]
    assert changed[:2] == [None, None]
    assert 0 < sum(changed[2:]) < len(changed[2:])


def test_a_model_agrees_with_itself(small_set, tmp_path):
    same = convert(TINY, tmp_path / "same", recipe="unquantized").folder
    quality = measure_quality(TINY, same, evaluation=small_set, max_tokens=12)
    assert quality.text.kl_mean == pytest.approx(0, abs=1e-9)
    assert quality.text.top1_agreement == 1
    assert quality.calls.num_same_text == quality.calls.num_conversations == 2
    assert quality.calls.num_alike == quality.calls.num_calling


def test_the_sources_answers_are_its_own_whoever_drafts_them(sources, tmp_path):
    out = convert(sources["moe"], tmp_path / "2bit", recipe="2bit").folder
    model, tokenizer = load(sources["moe"])
    prompts, stop_ids = [list(IDS), [7, 8, 9]], frozenset({2})
    answers = compare_answers(Layerwise(sources["moe"]), out, prompts, stop_ids, max_tokens=16)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.is_known
        assert answer.source == greedy(model, prompt, stop_ids, 16)
    assert any(answer.source != answer.converted for answer in answers)
    assert agreement_of(answers, tokenizer, [[], []]).num_same_text < len(answers)


def test_the_report_is_text_json_and_a_picture_and_joins_the_manifest(converted, small_set):
    quality = measure_quality(TINY, converted[4], evaluation=small_set, max_tokens=4)
    write_report(quality, converted[4])
    add_to_manifest(converted[4], FILES)
    check_manifest(converted[4])
    raw = json.loads((converted[4] / "quality.json").read_text())
    assert raw["text"]["kl_mean"] == quality.text.kl_mean
    text = (converted[4] / "QUALITY.md").read_text()
    assert f"| {quality.text.kl_mean:.5f} |" in text
    assert text.count("%") > 1 * len(quality.divergence.layers)
    bars = ElementTree.parse(converted[4] / "quality.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(quality.divergence.layers)


def test_the_command_takes_only_the_first_of_the_set_if_told(converted, small_set, tmp_path):
    (tmp_path / "set.json").write_text(json.dumps(small_set))
    flags = ["--evaluation", str(tmp_path / "set.json"), "--limit", "1", "--max-tokens", "3"]
    done = CliRunner().invoke(command, ["report", str(TINY), str(converted[8]), *flags])
    assert done.exit_code == 0, done.output
    raw = json.loads((converted[8] / "quality.json").read_text())
    assert raw["calls"]["num_conversations"] == 1
    check_manifest(converted[8])


def test_another_model_and_another_file_are_refused(sources, converted, tmp_path):
    with pytest.raises(ConversionError, match="conversion of the same model"):
        measure_quality(sources["moe"], converted[4])
    (tmp_path / "set.json").write_text('{"texts": []}')
    with pytest.raises(OptionError, match="expected"):
        read_set(tmp_path / "set.json")
