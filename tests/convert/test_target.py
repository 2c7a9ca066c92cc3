"""Recipes that are made for a size."""

import json
import os
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import Quantization
from lfm_mlx.convert import convert, preparation
from lfm_mlx.convert.__main__ import command
from lfm_mlx.convert.divergence import Scored, measure_divergence
from lfm_mlx.convert.layerwise import Layerwise
from lfm_mlx.convert.quality import read_set
from lfm_mlx.convert.rounding_cost import choices_for, measure_costs
from lfm_mlx.convert.segments import CheckpointSource
from lfm_mlx.convert.target import Option, choose
from lfm_mlx.errors import ConversionError, OptionError
from lfm_mlx.names import is_matrix, is_router
from lfm_mlx.terminal import run as run_command
from lfm_mlx.tokenizer import load_tokenizer

BITS = 4.535
TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of text that is not in the set that conversions are compared on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((TINY / "README.md").read_text()[:300])
    return file


@pytest.fixture(scope="module")
def prose():
    """What conversions are compared on."""
    tokenizer = load_tokenizer(TINY)
    return [Scored(ids=tuple(tokenizer.encode(item["text"])[:60])) for item in read_set()["texts"][:2]]


def kl_of(folder, prose):
    return measure_divergence(Layerwise(TINY), Layerwise(folder), [prose]).predictions[0].kl_mean


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_bytes_go_where_they_save_most_on_a_trained_model(text, prose, tmp_path):
    measured = convert(TINY, tmp_path / "measured", target_bpw=BITS, calibration=text)
    plain = convert(TINY, tmp_path / "4bit", recipe="4bit")
    assert plain.bits_per_weight == pytest.approx(BITS, rel=1e-3)
    found = convert(TINY, tmp_path / "free", target_bpw=BITS, rounding="minmax")
    sizes = [each.num_bytes for each in (found, measured)]
    assert all(0.98 * plain.num_bytes < size <= plain.num_bytes for size in sizes)
    kl = {each.folder.name: kl_of(each.folder, prose) for each in (plain, found, measured)}
    assert kl["measured"] < 0.5 * kl["4bit"]
    assert kl["free"] < 0.8 * kl["4bit"]


@pytest.mark.parametrize("bits", [4.5, 9.0])
def test_the_size_is_met_the_router_kept_and_what_is_one_matrix_at_run_time_stored_alike(sources, bits, tmp_path):
    result = convert(sources["moe"], tmp_path / "out", target_bpw=bits, rounding="minmax")
    assert 0.99 * bits < result.bits_per_weight <= bits
    assert result.num_bytes == Checkpoint(result.folder).num_bytes
    stored = json.loads((result.folder / "config.json").read_text())["quantization"]
    checkpoint = Checkpoint(result.folder)
    how = {name: checkpoint.quantization_of(name) for name in CheckpointSource(checkpoint).tensors if is_matrix(name)}
    assert all(each is None or each.bits == 8 for name, each in how.items() if is_router(name))
    for name, each in how.items():
        for first, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            assert all(how[name.replace(first, other)] == each for other in others)
    assert len(set(how.values())) > 2
    assert stored["bits"] in (3, 4, 5, 6, 8)


def test_mlx_lm_loads_it_and_predicts_the_same(sources, tmp_path):
    from mlx_lm import load as load_with_mlx_lm

    from lfm_mlx.load import load

    out = convert(sources["moe"], tmp_path / "out", target_bpw=5.0, rounding="minmax").folder
    tokens = mx.array([[1, 5, 9, 77, 3, 2, 14, 60]])
    theirs = np.array(load_with_mlx_lm(str(out))[0](tokens).astype(mx.float32))
    ours = np.array(load(out)[0](tokens).astype(mx.float32))
    assert np.corrcoef(theirs.flatten(), ours.flatten())[0, 1] > 0.99  # mlx-lm computes in bfloat16
    assert np.corrcoef(theirs.flatten(), np.roll(ours, 1, axis=-1).flatten())[0, 1] < 0.5


def test_any_number_of_processes_makes_the_same(sources, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text(" ".join(f"t{i * i % 127}" for i in range(100)))
    options = {"target_bpw": 5.5, "calibration": words}
    one = convert(sources["moe"], tmp_path / "one", jobs=1, **options)
    two = convert(sources["moe"], tmp_path / "two", jobs=2, task_bytes=50_000, **options)
    assert weights_of(one.folder) == weights_of(two.folder)
    manifests = [json.loads((each.folder / "manifest.json").read_text()) for each in (one, two)]
    assert manifests[0]["options"] == manifests[1]["options"]
    assert manifests[0]["options"]["target_bpw"] == 5.5
    assert manifests[0]["texts"]["words.txt"]["sha256"] == manifests[0]["options"]["text"]


def test_resumed_it_takes_the_recipe_that_was_found_and_refuses_another_size(sources, tmp_path, monkeypatch):
    def interrupt(done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            raise KeyboardInterrupt

    options = {"target_bpw": 6.0, "task_bytes": 20_000, "rounding": "minmax"}
    whole = convert(sources["moe"], tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        convert(sources["moe"], tmp_path / "out", progress=interrupt, **options)
    with pytest.raises(ConversionError, match="was begun with"):
        convert(sources["moe"], tmp_path / "out", resume=True, **{**options, "target_bpw": 7.0})
    searched = []
    found = preparation.find_recipe
    monkeypatch.setattr(preparation, "find_recipe", lambda *a, **b: searched.append(1) or found(*a, **b))
    result = convert(sources["moe"], tmp_path / "out", resume=True, **options)
    assert 0 < result.num_resumed_tasks < result.num_tasks
    assert not searched
    contents = [{path.name: path.read_bytes() for path in each.folder.iterdir()} for each in (whole, result)]
    assert contents[0] == contents[1]
    raw = json.loads(contents[0]["manifest.json"])["options"]["recipe"]
    (tmp_path / "mine.json").write_text(json.dumps(raw))
    again = convert(sources["moe"], tmp_path / "again", recipe=str(tmp_path / "mine.json"))
    assert weights_of(again.folder) == contents[0]["model.safetensors"]


@pytest.mark.parametrize("bits", [3.0, 17.0])
def test_a_size_out_of_reach_is_refused_with_the_sizes_that_are_not(bits, tmp_path):
    with pytest.raises(OptionError, match=rf"target_bpw is {bits:g}, expected 3\.\d+ to less than 16\.\d+ bits"):
        convert(TINY, tmp_path / "out", target_bpw=bits)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 4.5, "recipe": "4bit"}, "a recipe is given"),
        ({"target_bpw": -1}, "target_bpw is -1, expected bits per weight"),
        ({"target_bpw": True}, "target_bpw is True"),
    ],
)
def test_contradictions_are_refused(options, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        convert(TINY, tmp_path / "out", **options)


def test_a_quantised_source_is_refused(sources, tmp_path):
    quantised = convert(sources["moe"], tmp_path / "8bit", recipe="8bit").folder
    with pytest.raises(ConversionError, match="cannot be measured; convert the original"):
        convert(quantised, tmp_path / "out", target_bpw=5.0, requantize=True)


def test_the_command_says_the_size_before_it_starts(sources, tmp_path, capfd, monkeypatch):
    def run(*flags):
        monkeypatch.setattr(
            sys, "argv", ["convert", "--model", str(sources["moe"]), "--out", str(tmp_path / "out"), *flags]
        )
        with pytest.raises(SystemExit) as exit_info:
            run_command(command, "convert")
        return exit_info.value.code, capfd.readouterr().err

    code, error = run("--target-bpw", "4.5", "--bits", "4")
    assert (code, "--bits and --target-bpw exclude each other" in error) == (1, True)
    code, error = run("--target-bpw", "6", "--rounding", "minmax")
    assert code == 0
    stated = re.search(r"recipe 6bpw: .* -> [\d.]+ kB, (5\.9\d+|6\.000) bits per weight", error)
    assert stated


def test_what_a_matrix_costs_is_what_the_definition_says(sources):
    source = CheckpointSource(Checkpoint(sources["dense_new"]))
    name = "model.layers.1.self_attn.q_proj.weight"
    found = measure_costs(source, dict.fromkeys(source.tensors, "BF16"), None)
    assert found.keys() == {each for each in source.tensors if is_matrix(each)}
    weight = source.checkpoint.tensor(name)
    for how in (Quantization(bits=4, group_size=32), Quantization(bits=8, group_size=64)):
        restored = mx.dequantize(*mx.quantize(weight, how.group_size, how.bits), how.group_size, how.bits)
        error, size = (mx.square(x.astype(mx.float32)).sum().item() for x in (restored - weight, weight))
        assert found[name][how] == pytest.approx(8 * error / size, rel=0.02)
    assert found[name][None] == 0


def test_rows_that_do_not_divide_and_routers_have_fewer_choices():
    assert choices_for("model.layers.2.feed_forward.gate.weight", 64) == [
        Quantization(bits=8, group_size=64),
        Quantization(bits=8, group_size=32),
        None,
    ]
    assert choices_for("model.embed_tokens.weight", 80) == [None]


def test_the_step_that_saves_most_a_byte_comes_first_and_the_budget_is_kept():
    def options(*steps):
        return [Option(how=None, num_bytes=size, cost=cost) for size, cost in steps]

    groups = {("a",): options((10, 8.0), (20, 2.0), (40, 1.0)), ("b",): options((10, 9.0), (30, 1.0), (31, 0.9))}

    def sizes(budget):
        return [each.num_bytes for each in choose(groups, budget).values()]

    assert sizes(20) == [10, 10]
    assert sizes(30) == [20, 10]
    assert sizes(49) == [20, 10]
    assert sizes(50) == [20, 30]
    assert sizes(1000) == [40, 31]
