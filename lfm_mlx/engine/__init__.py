"""The generation core."""

from lfm_mlx.engine.engine import Engine
from lfm_mlx.engine.request import PackedMask, Request, Row, RowControl

__all__ = ["Engine", "PackedMask", "Request", "Row", "RowControl"]
