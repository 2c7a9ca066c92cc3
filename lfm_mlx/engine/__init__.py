"""The generation core."""

from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.following import follow
from lfm_mlx.engine.request import PackedMask, Request, Row, RowControl, TokenLogprob
from lfm_mlx.engine.service import EngineCounters, EngineThread

__all__ = [
    "Engine",
    "EngineCounters",
    "EngineThread",
    "PackedMask",
    "Request",
    "Row",
    "RowControl",
    "TokenLogprob",
    "follow",
]
