"""A server that is started again and again on one folder of prefixes: run as a program, it is one of the ranks."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launching import PATIENCE_S
from rank_scenario import GREEDY, ids

from lfm_mlx.cache import DiskStore, PrefixCache
from lfm_mlx.cache.block_file import read_block_header
from lfm_mlx.distributed import part_name
from lfm_mlx.engine import EngineThread, Request, follow
from lfm_mlx.load import load
from lfm_mlx.model import Model

FIRST = ids(1, 70)
SECOND = [*FIRST, *ids(2, 9)]


def new_cache(model: Model, folder: Path, part: str) -> PrefixCache:
    """A cache of blocks of 16 tokens."""
    disk = DiskStore(folder, max_bytes=1 << 30, fingerprint="one", part=part)
    return PrefixCache(model.config, dtype=model.dtype, max_bytes=1 << 24, block_tokens=16, disk=disk)


def served(model: Model, folder: Path, prompt: Sequence[int]) -> dict[str, Any]:
    """What a new server answers, and how much of the prompt it has not computed."""
    cache, is_over = new_cache(model, folder, part_name(model)), threading.Event()
    engine = EngineThread(model, prefix_cache=cache, memory_bytes=1 << 30)
    row = engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=6), is_over.set)
    while row.finish_reason is None:
        assert is_over.wait(PATIENCE_S)
        is_over.clear()
    engine.close()
    del engine, cache
    gc.collect()  # The other ranks are told that these are gone.
    return {"answer": row.generated, "cached": row.cached_tokens, "error": str(row.error)}


def blocks(folder: Path) -> list[Path]:
    """The files of a part."""
    return sorted(folder.rglob("*.safetensors"), key=lambda path: (path.stat().st_size, path.name))


def await_blocks(folder: Path, parts: Sequence[str]) -> None:
    """Wait until all parts have what the first one, which is complete, has last: it is written last."""
    deadline_s = time.monotonic() + PATIENCE_S
    last = max(blocks(folder / parts[0]), key=lambda path: read_block_header(path).start)
    while not all(last.name in [path.name for path in blocks(folder / part)] for part in parts):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def turns(model: Model, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Two turns, with a new server for the second.

    Args:
        model: on these ranks.
        folder: of the prefixes.
        parts: folders inside.
    """
    found = {"first": served(model, folder, FIRST)}
    await_blocks(folder, parts)
    found["second"] = served(model, folder, SECOND)
    await_blocks(folder, parts)
    return found


def losses(model: Model, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """The second turn again, when the last part has a damaged block, and when all of it is gone."""
    found: dict[str, Any] = {}
    damage(blocks(folder / parts[-1])[-1])
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    found["alone"] = {part: new_cache(model, copy, part).restore(SECOND, model.new_state()) for part in parts}
    found["damaged"] = served(model, folder, SECOND)
    await_blocks(folder, parts)
    found["mended"] = served(model, folder, SECOND)
    await_blocks(folder, parts)
    shutil.rmtree(folder / parts[-1])
    found["missing"] = served(model, folder, SECOND)
    return found


def damage(path: Path) -> None:
    """Change a byte of a tensor."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


if __name__ == "__main__":
    loaded = load(sys.argv[1], **{f"{sys.argv[2]}_parallel": 2})
    if not follow(loaded.model):
        names = [f"{sys.argv[2]}-2-{rank}" for rank in range(2)]
        where = loaded.model, Path(sys.argv[3]), names
        print(json.dumps({**turns(*where), **losses(*where)}))
