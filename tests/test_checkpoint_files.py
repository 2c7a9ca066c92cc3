"""A damaged or incomplete file of a checkpoint gives a CheckpointError that names it, and never another error."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import (
    as_hugging_face,
    random_weights,
    tiny_config,
    tiny_dense_config,
    write_checkpoint,
    write_tensors,
)

from lfm_mlx.checkpoint import Checkpoint, read_header
from lfm_mlx.errors import CheckpointError, ConfigError

# Files and shards.


def sharded(folder: Path) -> Path:
    raw = tiny_config()
    return write_tensors(folder, raw, as_hugging_face(random_weights(raw)), num_shards=3)


def shard(folder: Path, number: int) -> Path:
    return folder / f"model-{number:05}-of-00003.safetensors"


def test_an_index_that_names_an_absent_shard_is_refused(tmp_path):
    folder = sharded(tmp_path)
    shard(folder, 2).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: not found, but .* names it"):
        Checkpoint(folder)


def test_a_shard_that_lacks_a_listed_tensor_is_refused(tmp_path):
    folder = sharded(tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.extra"] = shard(folder, 1).name
    path.write_text(json.dumps(index))
    message = "model.layers.0.extra: .*index.json places it in model-00001-of-00003.safetensors, which does not hold it"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path)
    tensors = mx.load(str(shard(folder, 1)))
    name = next(iter(mx.load(str(shard(folder, 2)))))
    mx.save_safetensors(str(shard(folder, 1)), {**tensors, name: mx.zeros((1,))})
    with pytest.raises(
        CheckpointError, match=f"{name}: stored twice, in model-00001.* and model-00002.*, expected once"
    ):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": {"a": 5}}',
        b'{"weight_map": {"a": ["b"]}}',
        b'{"weight_map": {"a": null, "b": "c"}}',
        b'{"weight_map": {"a": "../../secret.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}',
        b'{"weight_map": {"a": "x\\u0000y"}}',
        b'{"weight_map": {"a": "\\ud800"}}',
        b'{"weight_map": {}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 5000,
    ],
    ids=lambda value: str(value[:30]),
)
def test_an_unusable_index_is_refused(tmp_path, index):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"weight_map|not found|cannot be read|missing"):
        Checkpoint(folder)


def test_a_folder_without_weights_says_what_it_found_and_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no weights, found config.json, pytorch_model.bin; expected model.saf"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="not found"):
        Checkpoint(tmp_path / "absent")


def test_a_folder_called_like_a_weight_file_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        Checkpoint(tmp_path)


# Bytes of one file.


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}


def safetensors(header: bytes | object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4661211808\n"

BAD_FILES = {
    "empty": (b"", "do not start with a safetensors header"),
    "short": (b"\0\0\0", "do not start with a safetensors header"),
    "lfs_pointer": (POINTER, "Git LFS pointer"),
    "zero_length": (safetensors(b"", length=0), "do not start with a safetensors header"),
    "absurd_length": (safetensors({}, length=2**63), "do not start with a safetensors header"),
    "length_past_the_end": (safetensors({}, length=100), "do not start with a safetensors header"),
    "not_json": (safetensors(b"{x}"), "damaged safetensors header"),
    "not_utf8": (safetensors(b'{"\xff\xfe": 1}'), "damaged safetensors header"),
    "a_list": (safetensors([1]), "damaged safetensors header"),
    "nested": (safetensors(b"[" * 200_000), "damaged safetensors header"),
    "entry_is_a_number": (safetensors({"a": 1}), "damaged safetensors header"),
    "no_dtype": (safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}), "damaged safetensors header"),
    "dtype_is_a_list": (safetensors({"a": entry(dtype=["F32"])}), "damaged safetensors header"),
    "shape_is_text": (safetensors({"a": entry(shape="22")}), "damaged safetensors header"),
    "shape_of_text": (safetensors({"a": entry(shape=["2", "2"])}), "damaged safetensors header"),
    "shape_of_floats": (safetensors({"a": entry(shape=[2.0, 2.0])}), "damaged safetensors header"),
    "negative_shape": (safetensors({"a": entry(shape=[-2, -2])}), "damaged safetensors header"),
    "huge_shape": (safetensors({"a": entry(shape=[10**300, 4])}), "damaged safetensors header"),
    "infinite_shape": (safetensors(b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'), "damaged"),
    "overflowing_shape": (safetensors({"a": entry(shape=[2**62, 2**62])}), "damaged safetensors header"),
    "negative_offsets": (safetensors({"a": entry(data_offsets=[-16, 0])}), "damaged safetensors header"),
    "swapped_offsets": (safetensors({"a": entry(data_offsets=[16, 0])}), "damaged safetensors header"),
    "offsets_are_text": (safetensors({"a": entry(data_offsets=["0", "16"])}), "damaged safetensors header"),
    "offsets_are_nan": (safetensors(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[NaN,NaN]}}'), "damaged"),
    "three_offsets": (safetensors({"a": entry(data_offsets=[0, 8, 16])}), "damaged safetensors header"),
    "no_offsets": (safetensors({"a": entry(data_offsets=[])}), "damaged safetensors header"),
    "offsets_too_narrow": (safetensors({"a": entry(data_offsets=[0, 12])}), "12 bytes of data, expected 16 for F32"),
    "truncated": (safetensors({"a": entry()}, b"\0" * 15), "expected .*; the file is truncated"),
    "huge_offsets": (safetensors({"a": entry(shape=[2**40], data_offsets=[0, 2**42])}), "the file is truncated"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_damaged_file_is_refused_by_name_before_any_weight_is_read(tmp_path, kind):
    content, message = BAD_FILES[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_control_a_sound_file_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"__metadata__": {"format": "pt"}, "a": entry()}))
    info = read_header(path)["a"]
    assert (info.dtype, info.shape, info.num_bytes) == ("F32", (2, 2), 16)


@pytest.fixture(scope="module")
def sound_bytes(tmp_path_factory) -> tuple[Path, bytes]:
    raw = tiny_dense_config(num_hidden_layers=2, layer_types=["conv", "full_attention"], vocab_size=8)
    folder = write_checkpoint(tmp_path_factory.mktemp("sound"), raw)
    return folder, (folder / "model.safetensors").read_bytes()


def read_everything(folder: Path) -> None:
    """Read a checkpoint and all its tensors; errors of any class but ours come out."""
    with contextlib.suppress(CheckpointError, ConfigError):
        checkpoint = Checkpoint(folder)
        mx.eval([checkpoint.tensor(name) for name in checkpoint.names])


BYTES = st.one_of(
    st.binary(min_size=1, max_size=6), st.sampled_from([b'"', b"}", b"[", b"-", b"0", b"9", b"1e9", b"null"])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_corrupted_header_bytes_never_give_another_error(sound_bytes, data):
    folder, sound = sound_bytes
    header_len = struct.unpack("<Q", sound[:8])[0]
    place = data.draw(st.one_of(st.integers(0, 8 + header_len), st.integers(0, len(sound))))
    patch = data.draw(BYTES)
    cut = data.draw(st.one_of(st.just(None), st.integers(0, len(sound))))
    is_inserted = data.draw(st.booleans())
    damaged = sound[:place] + patch + sound[place if is_inserted else place + len(patch) :]
    if is_inserted and data.draw(st.booleans()):
        damaged = struct.pack("<Q", header_len + len(patch)) + damaged[8:]
    (folder / "model.safetensors").write_bytes(damaged[:cut])
    read_everything(folder)


HEADER_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-4, 200), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_in_a_header_never_gives_another_error(sound_bytes, data):
    folder, sound = sound_bytes
    header_len = struct.unpack("<Q", sound[:8])[0]
    header = json.loads(sound[8 : 8 + header_len])
    name = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "format", None]))
    value = data.draw(
        st.one_of(HEADER_VALUES, st.sampled_from(["F64", "BOOL", "F8_E4M3", "U32", "I8", [0, 0], [0, 128]]))
    )
    if field is None:
        header[name] = value
    else:
        header[name][field] = value
    (folder / "model.safetensors").write_bytes(safetensors(header, sound[8 + header_len :]))
    read_everything(folder)


def test_control_a_sound_checkpoint_is_read_whole(sound_bytes):
    folder, sound = sound_bytes
    (folder / "model.safetensors").write_bytes(sound)
    checkpoint = Checkpoint(folder)
    mx.eval([checkpoint.tensor(name) for name in checkpoint.names])
