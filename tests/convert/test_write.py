import json
import struct

import mlx.core as mx
import pytest
from safetensors import safe_open

from lfm_mlx.convert.write import PlannedTensor, header_bytes, plan_shards, write_index, write_shards


def arrays_of_every_type():
    key = mx.random.key(0)
    return {
        "a.weight": mx.random.normal((5, 7), key=key).astype(mx.bfloat16),
        "b.bias": mx.random.normal((3,), key=key),
        "c.weight": mx.random.normal((4, 2, 3), key=key).transpose(0, 2, 1),
        "d.half": mx.random.normal((6,), key=key).astype(mx.float16),
        "e.packed": mx.random.randint(0, 2**31 - 1, (4, 4), key=key).astype(mx.uint32),
        "f.scales": mx.random.randint(0, 255, (4, 2), key=key).astype(mx.uint8),
    }


def plan(arrays):
    return [PlannedTensor.of(name, array) for name, array in arrays.items()]


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and mx.array_equal(a, b).item()


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_what_is_written_reads_back_bit_for_bit(tmp_path, shard_bytes):
    arrays = arrays_of_every_type()
    shards = plan_shards(plan(arrays), shard_bytes)
    write_shards(tmp_path, shards, iter(arrays.items()))
    loaded = {}
    for shard in shards:
        loaded |= mx.load(str(tmp_path / shard.file))
    assert loaded.keys() == arrays.keys()
    assert all(identical(loaded[name], arrays[name]) for name in arrays)
    assert not identical(loaded["c.weight"], arrays["c.weight"] + 1)


def test_the_safetensors_library_accepts_the_files(tmp_path):
    arrays = arrays_of_every_type()
    (shard,) = plan_shards(plan(arrays), 10**9)
    write_shards(tmp_path, [shard], iter(arrays.items()))
    with safe_open(tmp_path / shard.file, framework="numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == arrays.keys()
        assert file.get_tensor("c.weight").tolist() == arrays["c.weight"].tolist()
        assert file.get_slice("a.weight").get_shape() == [5, 7]


@pytest.mark.parametrize("count", range(1, 9))
def test_data_starts_at_a_multiple_of_eight(count):
    header = header_bytes([PlannedTensor(name="x" * count, dtype="F32", shape=(1,), num_bytes=4)])
    assert len(header) % 8 == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    assert json.loads(header[8:])["x" * count]["data_offsets"] == [0, 4]


def test_shards_keep_the_order_and_the_limit():
    sizes = [40, 60, 50, 200, 10, 10]
    tensors = [PlannedTensor(name=f"t{i}", dtype="U8", shape=(n,), num_bytes=n) for i, n in enumerate(sizes)]
    shards = plan_shards(tensors, 100)
    assert [[t.num_bytes for t in shard.tensors] for shard in shards] == [[40, 60], [50], [200], [10, 10]]
    assert [shard.file for shard in shards] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]


def test_one_shard_is_called_model_safetensors():
    (shard,) = plan_shards(plan(arrays_of_every_type()), 10**9)
    assert shard.file == "model.safetensors"


def test_index_places_every_tensor_and_sums_the_bytes(tmp_path):
    arrays = arrays_of_every_type()
    shards = plan_shards(plan(arrays), 100)
    write_index(tmp_path, shards, num_parameters=99)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values()), "total_parameters": 99}
    assert list(index["weight_map"]) == sorted(arrays)
    assert index["weight_map"] == {t.name: shard.file for shard in shards for t in shard.tensors}
