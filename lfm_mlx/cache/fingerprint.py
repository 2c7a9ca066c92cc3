"""What has to be equal for one process to use the blocks that another one has written."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

_TEXTS = (
    "config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_MAX_HEADER_BYTES = 100 << 20
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096


def checkpoint_fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's config, quantisation, tokenizer, template and weights, 40 hexadecimal digits.

    Of weight files it covers name, size, time of the last change, and header: reading gigabytes would take longer than
    the cache saves. A checkpoint that was copied without its times therefore begins with an empty cache.

    Args:
        folder: the checkpoint.
    """
    digest = _hash_texts(folder)
    for path in sorted(folder.glob("*.safetensors")):
        facts = path.stat()
        digest.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}".encode())
        digest.update(_header_bytes(path))
    return digest.hexdigest()


def content_fingerprint(folder: Path) -> str:
    """A hash that copies of a checkpoint share, 40 hexadecimal digits: as `checkpoint_fingerprint`, but instead of
    times it covers samples of the weights' bytes.

    Args:
        folder: the checkpoint.
    """
    digest = _hash_texts(folder)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode() + _header_bytes(path))
        with path.open("rb") as stream:
            for i in range(_NUM_SAMPLES):
                stream.seek(size * i // _NUM_SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _hash_texts(folder: Path) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=20)
    for name in _TEXTS:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(struct.pack("<QQ", len(name), len(content)) + name.encode() + content)
    return digest


def _header_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        return start + stream.read(min(length, _MAX_HEADER_BYTES))
