import pytest

from lfm_mlx.config import BITS, GROUP_SIZES, Quantization
from lfm_mlx.convert.recipes import RECIPES, recipe_named, uniform_recipe
from lfm_mlx.errors import OptionError

ROUTER = "model.layers.2.feed_forward.gate.weight"
MATRIX = "model.layers.2.feed_forward.switch_mlp.down_proj.weight"

QUANTIZING = sorted(name for name, recipe in RECIPES.items() if recipe.default is not None)


@pytest.mark.parametrize("name", QUANTIZING)
def test_router_keeps_eight_affine_bits_in_every_recipe(name):
    recipe = recipe_named(name)
    assert recipe.of(ROUTER, (32, 2048)) == Quantization(bits=8, group_size=64, mode="affine")
    assert recipe.of(MATRIX, (32, 2048, 1792)) == recipe.default


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
