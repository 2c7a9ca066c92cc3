"""Many processes, other shards, other pieces: the same bytes."""

import hashlib
import itertools
import json
import shutil

import mlx.core as mx
import pytest

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.convert import convert
from lfm_mlx.convert.job import Job
from lfm_mlx.convert.recipes import recipe_named
from lfm_mlx.convert.segments import CheckpointSource
from lfm_mlx.errors import ConversionError


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(sources, tmp_path_factory):
    """What one process makes of the source in three shards."""
    return weights_of(convert(sources["moe"], tmp_path_factory.mktemp("alone") / "out", jobs=1).folder)


def test_three_processes_make_what_one_makes(sources, alone, tmp_path):
    result = convert(sources["moe"], tmp_path / "out", jobs=3, task_bytes=10_000)
    assert result.num_tasks > 10
    assert weights_of(result.folder) == alone


@pytest.mark.parametrize("num_shards", [1, 40])
def test_the_layout_of_the_source_does_not_matter(make_weights, make_checkpoint, configs, alone, tmp_path, num_shards):
    source = make_checkpoint(
        tmp_path / "source", configs["moe"], make_weights(configs["moe"], 128), num_shards=num_shards
    )
    assert weights_of(convert(source, tmp_path / "out").folder) == alone


def test_pieces_of_any_size_cover_each_byte_once(sources):
    source = CheckpointSource(Checkpoint(sources["moe"]))
    for piece_bytes in (1, 1000, 10**9):
        options = {"dtype": None, "shard_bytes": 50_000, "piece_bytes": piece_bytes, "task_bytes": 5000}
        job = Job(source, recipe_named("4bit"), **options)
        written = sorted(
            (extent.file, extent.offset, extent.num_bytes)
            for task in job.tasks
            for piece in task.pieces
            for extent in piece.writes
        )
        assert sum(size for _, _, size in written) == job.num_bytes
        for (file, offset, size), (next_file, next_offset, _) in itertools.pairwise(written):
            assert next_file != file or next_offset == offset + size
        assert job.source_bytes == source.checkpoint.num_bytes


def test_a_worker_passes_on_what_is_wrong_with_a_value(make_weights, make_checkpoint, configs, tmp_path):
    weights = make_weights(configs["dense_old"], 128)
    name = "model.layers.2.feed_forward.w2.weight"
    weights[name] = weights[name] * 1e6
    source = make_checkpoint(tmp_path / "source", configs["dense_old"], weights)
    with pytest.raises(ConversionError, match=f"{name}: holds values that float16 cannot"):
        convert(source, tmp_path / "out", dtype="float16", jobs=2, task_bytes=20_000)
    assert not (tmp_path / "out").exists()


def test_manifest_names_every_file_of_source_and_result(sources, tmp_path):
    source = shutil.copytree(sources["moe"], tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: other\n---\n")
    out = convert(source, tmp_path / "out", task_bytes=20_000).folder
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"].keys() == {path.name for path in source.iterdir()}
    for name, entry in manifest["source"].items():
        data = (source / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["files"].keys() == {path.name for path in out.iterdir()} - {"manifest.json"}
    assert manifest["files"]["LICENSE"] == manifest["source"]["LICENSE"]
    assert manifest["options"]["recipe"]["default"]["bits"] == 4


def test_searched_scales_are_the_same_for_any_pieces(sources, tmp_path):
    one = convert(sources["moe"], tmp_path / "one", rounding="search").folder
    two = convert(sources["moe"], tmp_path / "two", rounding="search", jobs=2, task_bytes=10_000).folder
    plain = convert(sources["moe"], tmp_path / "plain").folder
    assert weights_of(one) == weights_of(two)
    assert weights_of(one) != weights_of(plain)
    assert mx.load(str(one / "model.safetensors")).keys() == mx.load(str(plain / "model.safetensors")).keys()
