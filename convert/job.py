"""What will be made of a checkpoint: known to the byte before any weight is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lfm_mlx.config import ModelConfig, Quantization
from lfm_mlx.errors import ConversionError
from lfm_mlx.names import Shape, expected_tensors

from .hashing import sha256_of
from .quantize import DTYPES
from .recipes import Recipe
from .segments import Segment, WeightSource
from .tasks import PIECE_BYTES, TASK_BYTES, Task, Treatment, plan_tasks
from .write import PlannedTensor, Shard, plan_shards, plan_tensors

_SEARCH_PIECE_BYTES = PIECE_BYTES // 4
"""Searching scales needs some twenty float32 arrays of a piece's size."""


class Job:
    """A conversion that is planned.

    Args:
        source: the checkpoint.
        recipe: how each matrix is stored.
        dtype: type of unquantised values, None to keep what ``torch_dtype`` of config.json or each tensor has.
        importance: by our name, where float32 weights of a matrix's columns are; None weighs all alike.
        shard_bytes: most bytes of tensors in one file.
        found: how the recipe was found, for the record.

    Raises:
        ConversionError: the recipe quantises nothing of this model.
    """

    def __init__(
        self,
        source: WeightSource,
        recipe: Recipe,
        *,
        dtype: str | None,
        shard_bytes: int,
        importance: Mapping[str, Segment] | None = None,
        piece_bytes: int | None = None,
        task_bytes: int = TASK_BYTES,
        found: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.found = dict(found or {})
        self.dtype = target_dtype(source, dtype)
        self.calibration = _digest(importance)
        shapes = source.tensors
        num_layers = source.config.num_layers
        self.stored_as = {name: recipe.of(name, shape, num_layers) for name, shape in shapes.items()}
        self._check_recipe()
        self.num_parameters = sum(math.prod(shape) for shape in shapes.values())
        treatments = {
            name: Treatment(
                how=how,
                dtype=written_dtype(source, dtype, name),
                search=recipe.searches,
                importance=(importance or {}).get(name) if how is not None else None,
            )
            for name, how in self.stored_as.items()
        }
        self.planned = _planned(shapes, treatments)
        self.num_bytes = sum(tensor.num_bytes for tensor in self.planned)
        self.shards: tuple[Shard, ...] = plan_shards(self.planned, shard_bytes)
        default_piece = _SEARCH_PIECE_BYTES if recipe.searches else PIECE_BYTES
        self.tasks: tuple[Task, ...] = plan_tasks(
            source, treatments, self.shards, piece_bytes=piece_bytes or default_piece, task_bytes=task_bytes
        )
        self.source_bytes = sum(task.source_bytes for task in self.tasks)

    @property
    def bits_per_weight(self) -> float:
        """Bits written for each value of the model."""
        return 8 * self.num_bytes / self.num_parameters

    def overrides(self) -> dict[str, Quantization]:
        """The matrices that are stored in another way than most, and the routers, by module path."""
        default = self.recipe.default
        return {
            name.removesuffix(".weight"): how
            for name, how in self.stored_as.items()
            if how is not None and how is not default
        }

    def fingerprint(self, source_folder: Path) -> str:
        """A hash of everything that decides which bytes are written where, except for the source's content."""
        digest = hashlib.sha256()
        for task in self.tasks:
            for piece in task.pieces:
                fields = asdict(piece)
                for read in fields["reads"]:
                    read["file"] = str(Path(read["file"]).relative_to(source_folder))
                if piece.importance is not None:
                    fields["importance"]["file"] = ""
                digest.update(repr(fields).encode())
        return digest.hexdigest()

    def _check_recipe(self) -> None:
        default = self.recipe.default
        if default is not None and not any(self.stored_as.values()):
            raise ConversionError(
                f"recipe {self.recipe.name}: no matrix has rows that divide into groups of {default.group_size}; "
                "choose a smaller --group-size, or --no-quantize"
            )


def target_dtype(source: WeightSource, requested: str | None) -> str | None:
    """The type to cast to; None leaves each tensor its own, as mlx-lm does when config.json has no ``torch_dtype``."""
    name = requested or str(source.config.raw.get("torch_dtype")).removeprefix("torch.")
    return name if name in DTYPES else None


def written_dtype(source: WeightSource, requested: str | None, name: str) -> str:
    """The type, as safetensors spells it, of our tensor's values where they stay unquantised, or of affine scales."""
    if name.endswith("expert_bias"):
        return "F32"  # it decides near-ties
    dtype = target_dtype(source, requested)
    return DTYPES[dtype] if dtype is not None else source.dtype(name)


def _planned(shapes: Mapping[str, Shape], treatments: Mapping[str, Treatment]) -> list[PlannedTensor]:
    return [
        tensor
        for name, shape in shapes.items()
        for tensor in plan_tensors(name, shape, treatments[name].dtype, treatments[name].how)
    ]


def planned_size(config: ModelConfig, recipe: Recipe) -> tuple[int, float]:
    """Bytes of the tensors of a bfloat16 model stored by `recipe`, and bits for each value of it."""
    shapes = expected_tensors(config)
    planned = _planned(
        shapes,
        {
            name: Treatment(
                how=recipe.of(name, shape, config.num_layers), dtype="F32" if name.endswith("expert_bias") else "BF16"
            )
            for name, shape in shapes.items()
        },
    )
    num_bytes = sum(tensor.num_bytes for tensor in planned)
    return num_bytes, 8 * num_bytes / values_in(config)


def values_in(config: ModelConfig) -> int:
    """Values of the unquantised model."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def describe(job: Job) -> dict[str, Any]:
    """The options of a job as JSON."""
    return {"recipe": job.recipe.as_json(), "dtype": job.dtype, "calibration": job.calibration, **job.found}


def _digest(importance: Mapping[str, Segment] | None) -> str | None:
    """The SHA-256 of what a calibration found; None without one."""
    files = {segment.file for segment in (importance or {}).values()}
    return sha256_of(files.pop()) if files else None
