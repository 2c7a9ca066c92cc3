from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from lfm_mlx.convert import convert
from lfm_mlx.convert.calibration import calibrate
from lfm_mlx.convert.layerwise import Layerwise
from lfm_mlx.convert.piecework import read_rows
from lfm_mlx.convert.quality import read_set
from lfm_mlx.errors import OptionError
from lfm_mlx.names import is_matrix

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of English text."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(read_set()["texts"][0]["text"][:400])
    return file


@pytest.fixture(scope="module")
def found(text, tmp_path_factory):
    """What is measured over the text."""
    return calibrate(TINY, text.read_text(), tmp_path_factory.mktemp("found") / "columns")


def test_every_matrix_of_the_layers_is_measured(found):
    tensors = {name: shape for name, shape in shapes().items() if is_matrix(name) and "embed_tokens" not in name}
    assert found.keys() == tensors.keys()
    for name, shape in tensors.items():
        values = np.array(read_rows(found[name]))
        assert values.shape == (shape[0] if len(shape) == 3 else 1, shape[-1])
        assert (values >= 0).all()
        assert values.sum() > 0


def shapes():
    from lfm_mlx.checkpoint import Checkpoint
    from lfm_mlx.names import expected_tensors

    return expected_tensors(Checkpoint(TINY).config)


def test_the_first_matrix_gets_what_the_definition_says(text, found):
    model = Layerwise(TINY)
    from lfm_mlx.tokenizer import load_tokenizer

    ids = load_tokenizer(TINY).encode(text.read_text())
    (x,) = model.embed([ids[:512]])
    expected = mx.square(model.layer(0).operator_norm(x)).mean(axis=(0, 1))
    made = read_rows(found["model.layers.0.conv.in_proj.weight"])[0]
    np.testing.assert_allclose(np.array(made), np.array(expected), rtol=1e-4)


def test_a_calibrated_conversion_has_other_scales_and_leaves_nothing_beside_it(sources, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"t{i * i % 127}" for i in range(100)))
    calibrated = convert(sources["moe"], tmp_path / "calibrated", recipe="3bit", calibration=tmp_path / "text.txt")
    searched = convert(sources["moe"], tmp_path / "searched", recipe="3bit", rounding="search")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibrated", "searched", "text.txt"]
    assert calibrated.num_bytes == searched.num_bytes
    first, second = ((each.folder / "model.safetensors").read_bytes() for each in (calibrated, searched))
    assert first != second


def test_too_little_text_and_minmax_are_refused(text, tmp_path):
    with pytest.raises(OptionError, match="expected at least 64"):
        calibrate(TINY, "too short", tmp_path / "columns")
    with pytest.raises(OptionError, match="rounding is 'minmax'"):
        convert(TINY, tmp_path / "out", calibration=text, rounding="minmax")
