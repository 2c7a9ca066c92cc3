"""Full-size models without memory, made once."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from lfm_mlx.bench.peer import Peer, made_up_peer
from lfm_mlx.bench.shapes import ViewWeights, config_named, made_up_model
from lfm_mlx.bench.sides import Ours

FULL_SIZE = "lfm2.5-8b-a1b"


@pytest.fixture(scope="session")
def ours() -> Ours:
    """This runtime, compiled, with LFM2.5-8B-A1B of no memory."""
    return Ours(made_up_model(ViewWeights(config_named(FULL_SIZE)), mx.bfloat16), is_compiled=True)


@pytest.fixture(scope="session")
def peer() -> Peer:
    """mlx-lm with the same model."""
    return made_up_peer(ViewWeights(config_named(FULL_SIZE)), mx.bfloat16)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Spares the seconds that MLX's CPU backend takes to compile what mlx-lm marks for it."""
    mx.disable_compile()
    yield
    mx.enable_compile()
