import json

import pytest

from lfm_mlx.config import BITS, GROUP_SIZES, Quantization
from lfm_mlx.convert.recipes import RECIPES, parse_recipe, recipe_named, uniform_recipe
from lfm_mlx.errors import OptionError

ROUTER = "model.layers.2.feed_forward.gate.weight"
MATRIX = "model.layers.2.feed_forward.switch_mlp.down_proj.weight"

QUANTIZING = sorted(name for name, recipe in RECIPES.items() if recipe.default is not None)


@pytest.mark.parametrize("name", QUANTIZING)
def test_router_keeps_eight_affine_bits_in_every_recipe(name):
    recipe = recipe_named(name)
    assert recipe.of(ROUTER, (32, 2048)) == Quantization(bits=8, group_size=64, mode="affine")
    assert recipe.of(MATRIX, (32, 2048, 1792), 24) == recipe.default


@pytest.mark.parametrize(
    ("width", "group_size", "expected"),
    [
        (2048, 64, Quantization(bits=8, group_size=64)),
        (96, 32, Quantization(bits=8, group_size=32)),
        (2048, 128, Quantization(bits=8, group_size=64)),
        (192, 128, None),
        (80, 32, None),
    ],
)
def test_router_takes_the_largest_group_that_fits(width, group_size, expected):
    assert uniform_recipe(bits=4, group_size=group_size).of(ROUTER, (4, width)) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embedding_norm.weight", (64,)),
        ("model.layers.0.operator_norm.weight", (64,)),
        ("model.layers.0.ffn_norm.weight", (64,)),
        ("model.layers.1.self_attn.q_layernorm.weight", (64,)),
        ("model.layers.0.conv.conv.weight", (64, 3, 1)),
        ("model.layers.0.conv.in_proj.bias", (192,)),
        ("model.layers.2.feed_forward.expert_bias", (64,)),
    ],
)
@pytest.mark.parametrize("recipe", QUANTIZING)
def test_norms_taps_and_biases_are_never_quantised(recipe, name, shape):
    assert recipe_named(recipe).of(name, shape) is None


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.conv.in_proj.weight"])
def test_embedding_head_and_projections_are_quantised_like_the_rest(name):
    recipe = recipe_named("4bit")
    assert recipe.of(name, (128, 64)) == Quantization(bits=4, group_size=64)


def test_a_matrix_whose_rows_do_not_divide_into_groups_stays_unquantised():
    recipe = uniform_recipe(bits=4, group_size=64)
    assert recipe.of(MATRIX, (4, 64, 96)) is None
    assert recipe.of(MATRIX, (4, 64, 128)) is not None


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [(mode, b, g) for mode in BITS for b in BITS[mode] for g in GROUP_SIZES[mode]]
)
def test_every_combination_that_mlx_offers_makes_a_recipe(mode, bits, group_size):
    recipe = uniform_recipe(mode=mode, bits=bits, group_size=group_size)
    assert recipe.default == Quantization(mode=mode, bits=bits, group_size=group_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "bits is 7, expected 2, 3, 4, 5, 6, 8 in mode affine"),
        ({"bits": 4.0}, "bits is 4.0, expected a whole number"),
        ({"bits": 0}, "bits is 0"),
        ({"group_size": 16}, "group_size is 16, expected 32, 64, 128 in mode affine"),
        ({"mode": "mxfp4", "group_size": 64}, "group_size is 64, expected 32 in mode mxfp4"),
        ({"mode": "mxfp8", "bits": 4}, "bits is 4, expected 8 in mode mxfp8"),
        ({"mode": "afine"}, "nearest: affine"),
    ],
)
def test_values_that_mlx_does_not_offer_are_refused_by_name(options, message):
    with pytest.raises(OptionError, match=message):
        uniform_recipe(**options)


def test_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(OptionError, match=r"recipe is '4bits'.*nearest: 4bit"):
        recipe_named("4bits")


def test_modes_bring_their_own_bits_and_group_size():
    assert uniform_recipe().default == Quantization(bits=4, group_size=64, mode="affine")
    assert uniform_recipe(mode="mxfp8").default == Quantization(bits=8, group_size=32, mode="mxfp8")
    assert uniform_recipe(mode="nvfp4").default == Quantization(bits=4, group_size=16, mode="nvfp4")


def test_mixed_gives_what_every_token_passes_more_bits_than_the_experts():
    recipe = recipe_named("mixed")
    experts = recipe.of(MATRIX, (32, 2048, 1792), 24)
    assert (experts.bits, experts.group_size) == (4, 32)
    last = recipe.of(MATRIX.replace(".2.", ".23."), (32, 2048, 1792), 24)
    assert last.bits > experts.bits
    for name in (
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.conv.in_proj.weight",
    ):
        assert recipe.of(name, (2048, 2048), 24).bits > experts.bits
    assert recipe.searches


def test_the_first_rule_that_matches_decides_and_its_group_shrinks_to_fit():
    rules = [{"match": "*.conv.*", "bits": 16}, {"match": "*.0.*", "layers": [0, -1], "bits": 8, "group_size": 128}]
    recipe = parse_recipe({"default": {"bits": 3}, "rules": rules}, "mine")
    assert recipe.of("model.layers.0.conv.in_proj.weight", (64, 64), 2) is None
    assert recipe.of("model.layers.0.self_attn.q_proj.weight", (64, 96), 2) == Quantization(bits=8, group_size=32)
    assert recipe.of("model.layers.1.self_attn.q_proj.weight", (64, 64), 2) == recipe.default
    assert parse_recipe(recipe.as_json(), "again") == recipe


def test_a_recipe_file_is_a_recipe(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"default": {"bits": 5}, "rounding": "search"}))
    recipe = recipe_named(str(file))
    assert (recipe.name, recipe.default.bits, recipe.searches) == ("mine", 5, True)


@pytest.mark.parametrize("pattern", ["*.feed_forward.gate", "*", "model.layers.7.*"])
def test_a_rule_that_puts_the_router_under_eight_bits_is_refused(pattern):
    rules = [{"match": pattern, "bits": 4}]
    with pytest.raises(OptionError, match=r"puts the router .* into 4 bits, expected at least 8"):
        parse_recipe({"rules": rules}, "mine")
    router_first = parse_recipe({"rules": [{"match": "*.feed_forward.gate", "bits": 16}, *rules]}, "mine")
    assert router_first.of(ROUTER, (32, 2048), 24) is None
    only_first_layer = {"match": "*.feed_forward.gate", "layers": [0], "bits": 8}
    with pytest.raises(OptionError, match="puts the router"):
        parse_recipe({"rules": [only_first_layer, *rules]}, "mine")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], r"recipe mine is .*expected an object"),
        ({"defaults": {}}, "'defaults' is not known.*nearest: default"),
        ({"rounding": "nearest"}, "rounding is 'nearest', expected one of minmax, search"),
        ({"rules": [{"bits": 4}]}, r"rules\[0\]: match is None"),
        ({"rules": [{"match": "*", "bits": 7}]}, r"rules\[0\]: bits is 7"),
        ({"rules": [{"match": "*", "layers": "first", "bits": 8}]}, r"rules\[0\]: layers is 'first'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_key(raw, message):
    with pytest.raises(OptionError, match=message):
        parse_recipe(raw, "mine")
