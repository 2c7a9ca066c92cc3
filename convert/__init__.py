"""Turns a Hugging Face checkpoint of LFM2 or LFM2.5 into the folder that lfm_mlx and mlx-lm load."""

from .conversion import ConversionResult, convert
from .recipes import RECIPES, Recipe, recipe_named, uniform_recipe
from .verify import verify

__all__ = ["RECIPES", "ConversionResult", "Recipe", "convert", "recipe_named", "uniform_recipe", "verify"]
