"""What noise in a matrix does is foretold by the gradients."""

import random

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import Quantization
from lfm_mlx.convert import convert
from lfm_mlx.convert.divergence import Scored, measure_divergence
from lfm_mlx.convert.layerwise import Layerwise
from lfm_mlx.convert.recipes import parse_recipe
from lfm_mlx.convert.rounding_cost import measure_costs
from lfm_mlx.convert.segments import CheckpointSource
from lfm_mlx.convert.sensitivity import measure_sensitivity
from lfm_mlx.errors import OptionError
from lfm_mlx.kernels import KERNELS_VARIABLE
from lfm_mlx.names import is_matrix

DICE = random.Random(3)
WORDS = [DICE.randrange(128) for _ in range(256)]
SEQUENCES = [Scored(ids=tuple(WORDS))]
BITS = 6


@pytest.fixture(scope="module")
def found(sources):
    """Sensitivities of two random models over some words."""
    text = " ".join(f"t{i}" for i in WORDS)
    return {kind: measure_sensitivity(sources[kind], text) for kind in ("moe", "dense_new")}


@pytest.fixture(scope="module")
def costs(sources, found):
    """What each way of storing their matrices costs."""

    def of(kind):
        source = CheckpointSource(Checkpoint(sources[kind]))
        return measure_costs(source, dict.fromkeys(source.tensors, "BF16"), found[kind])

    return {kind: of(kind) for kind in found}


def test_every_matrix_has_one_for_each_place_where_it_is_used(sources, found):
    shapes = CheckpointSource(Checkpoint(sources["moe"])).tensors
    assert found["moe"].keys() == {name for name in shapes if is_matrix(name)}
    for name, places in found["moe"].items():
        num_experts = shapes[name][0] if len(shapes[name]) == 3 else 1
        assert len(places) == (2 if name == "model.embed_tokens.weight" else 1)
        for place in places:
            assert place.columns.shape == (num_experts, shapes[name][-1])
            assert mx.all(place.columns >= 0).item()
            assert place.columns.sum().item() > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dense_new", "model.embed_tokens"),
        ("dense_new", "model.layers.0.feed_forward.w2"),
        ("dense_new", "model.layers.1.self_attn.v_proj"),
        # Before the last router, noise would change which experts are chosen, which no gradient tells.
        ("moe", "model.layers.3.feed_forward.switch_mlp.down_proj"),
    ],
)
def test_one_matrix_stored_in_few_bits_costs_about_what_was_foretold(sources, costs, tmp_path, kind, name):
    rules = [{"match": name, "bits": BITS}, {"match": "*", "bits": 16}]
    out = convert(sources[kind], tmp_path / "out", recipe=parse_recipe({"rules": rules}, "one")).folder
    assert sum(Checkpoint(out).quantization_of(each) is not None for each in costs[kind]) == 1
    made = measure_divergence(Layerwise(sources[kind]), Layerwise(out), [SEQUENCES])
    measured = made.predictions[0].kl_mean
    foretold = costs[kind][f"{name}.weight"]
    assert 0.25 < foretold[Quantization(bits=BITS, group_size=64)] / measured < 4
    assert foretold[Quantization(bits=BITS, group_size=64)] < foretold[Quantization(bits=4, group_size=64)] / 8


def test_the_environment_is_left_as_it_was_and_little_text_is_refused(sources, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "off")
    with pytest.raises(OptionError, match="expected at least 64"):
        measure_sensitivity(sources["moe"], "t1 t2")
    text = " ".join(f"t{i}" for i in WORDS[:70])
    first, again = (measure_sensitivity(sources["moe"], text) for _ in range(2))
    for name, places in first.items():
        for one, other in zip(places, again[name], strict=True):
            np.testing.assert_array_equal(np.array(one.columns), np.array(other.columns))
