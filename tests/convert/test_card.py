import shutil
from pathlib import Path

from lfm_mlx.convert import convert
from lfm_mlx.convert.card import Origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_card_names_source_recipe_size_and_licence(sources, tmp_path):
    result = convert(sources["moe"], tmp_path / "out", recipe="6bit")
    card = (result.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\nlicense: other\nlicense_name: lfm1.0\n")
    assert "Made from `moe` by lfm_mlx with recipe `6bit` (rounding: minmax)" in card
    assert f"{result.bits_per_weight:.3f} bits per weight" in card
    assert "LFM Open License v1.0" in card


def test_the_sources_own_licence_is_carried_over(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Fine-tune\nlicense: no\n")
    card = (convert(source, tmp_path / "out").folder / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert "license_name" not in card


def test_the_hubs_cache_tells_repo_and_commit():
    folder = Path(f"hub/models--LiquidAI--LFM2.5-8B-A1B/snapshots/{COMMIT}")
    assert Origin.of(folder) == Origin(name="LiquidAI/LFM2.5-8B-A1B", revision=COMMIT)
    assert Origin.of(folder / "bf16") == Origin(name="LiquidAI/LFM2.5-8B-A1B/bf16", revision=COMMIT)
    assert Origin.of(Path("models/mine")) == Origin(name="mine", revision=None)
