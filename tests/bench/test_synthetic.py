import mlx.core as mx
import pytest

from lfm_mlx.bench.conversion_cost import ask_conversion_cost, count_equal
from lfm_mlx.bench.synthetic import write_synthetic
from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.errors import OptionError


@pytest.mark.parametrize("shapes", ["tiny-moe", "tiny-dense"])
def test_a_synthetic_checkpoint_is_a_checkpoint_of_that_geometry(shapes, tmp_path):
    num_bytes = write_synthetic(shapes, tmp_path / "out", num_shards=3)
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.num_bytes == num_bytes
    assert len(checkpoint.files) == 3
    weight = checkpoint.tensor("model.embed_tokens.weight").astype(mx.float32)
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)


def test_heavy_tails_have_outliers(tmp_path):
    largest = {}
    for tails in ("normal", "heavy"):
        write_synthetic("tiny-dense", tmp_path / tails, tails=tails)
        weight = Checkpoint(tmp_path / tails).tensor("model.layers.0.conv.in_proj.weight").astype(mx.float32)
        largest[tails] = (mx.abs(weight).max() / weight.std()).item()
    assert largest["normal"] < 6 < 12 < largest["heavy"]


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(OptionError, match="which exists"):
        write_synthetic("tiny-moe", tmp_path)


def test_a_conversion_is_measured_with_all_its_processes(tmp_path):
    write_synthetic("tiny-moe", tmp_path / "source")
    report = ask_conversion_cost(tmp_path / "source", jobs=2)
    cost = report.results["lfm_mlx"]
    assert cost["num_processes"] >= 1
    assert cost["peak_bytes"] > 10_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unequal_tensors_are_counted(tmp_path):
    for seed in (0, 1):
        write_synthetic("tiny-dense", tmp_path / str(seed), seed=seed)
    same, total = count_equal(tmp_path / "0", tmp_path / "0")
    other, _ = count_equal(tmp_path / "0", tmp_path / "1")
    assert (same, other < total) == (total, True)
