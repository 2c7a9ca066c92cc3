"""Rows of a GGUF file's blocks as float32, through the `gguf` package."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_mlx.errors import ConversionError


def dequantized_blocks(data: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """The values of rows of blocks.

    Args:
        data: uint8 (rows, bytes in a row).
        type_name: GGUF's name of the block, such as Q4_K.

    Raises:
        ConversionError: the `gguf` package is not installed, or does not know the type.
    """
    gguf = import_gguf()
    values: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])
    return values


def import_gguf() -> Any:
    """The `gguf` package, an optional extra.

    Raises:
        ConversionError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConversionError(
            "reading GGUF files needs the gguf package, which is not installed; run: pip install 'lfm-mlx[gguf]'"
        ) from error
