"""A fingerprint changes with everything that decides what a block holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lfm_mlx.cache import checkpoint_fingerprint


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_another_text_file_is_another_fingerprint(checkpoint_folder: Path, name: str) -> None:
    path = checkpoint_folder / name
    path.write_text((path.read_text() if path.exists() else "{}") + " ")
    before = checkpoint_fingerprint(checkpoint_folder)
    assert checkpoint_fingerprint(checkpoint_folder) == before
    path.write_text(path.read_text() + " ")
    assert checkpoint_fingerprint(checkpoint_folder) != before


def test_other_weights_are_another_fingerprint(checkpoint_folder: Path) -> None:
    path = checkpoint_folder / "model.safetensors"
    found = {checkpoint_fingerprint(checkpoint_folder)}
    content, facts = bytearray(path.read_bytes()), path.stat()
    os.utime(path, (facts.st_atime, facts.st_mtime + 1))
    found.add(checkpoint_fingerprint(checkpoint_folder))
    content[20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    found.add(checkpoint_fingerprint(checkpoint_folder))
    path.rename(path.with_name("model-00001.safetensors"))
    found.add(checkpoint_fingerprint(checkpoint_folder))
    assert len(found) == 4


def test_a_file_s_end_is_not_another_s_beginning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("ab")
    before = checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("a")
    (tmp_path / "tokenizer.json").write_text("b")
    assert checkpoint_fingerprint(tmp_path) != before
