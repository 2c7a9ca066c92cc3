"""A checkpoint folder in, a converted folder out, one tensor in memory at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import Quantization
from lfm_mlx.errors import CheckpointError, ConversionError, OptionError
from lfm_mlx.names import expected_tensors
from lfm_mlx.types import check_integer

from .quantize import DTYPES, cast, check_float16, quantize
from .recipes import Recipe, recipe_named
from .sidecars import config_json, copy_sidecars, find_sidecars
from .staging import check_destination, check_space, staged, tidy
from .verify import verify
from .write import SHARD_BYTES, PlannedTensor, Shard, plan_shards, write_index, write_json, write_shards

Progress = Callable[[int, int], None]
"""Called at the start and after each tensor with the source bytes converted so far and the bytes there are in all."""

_SPARE_BYTES = 1 << 20
"""Room asked for beyond tensors and copied files: headers, index, config.json."""


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """What a conversion made.

    Args:
        folder: the finished checkpoint.
        source_bytes: bytes of the tensors that were read.
        num_bytes: bytes of the tensors that were written.
        num_parameters: values of the unquantised model.
        num_shards: files of weights.
        elapsed_s: wall-clock seconds.
        notes: what the caller may want to know: files that were missing, leftovers that were removed.
    """

    folder: Path
    source_bytes: int
    num_bytes: int
    num_parameters: int
    num_shards: int
    elapsed_s: float
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits written for each value of the model."""
        return 8 * self.num_bytes / self.num_parameters


def convert(
    source: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | str = "4bit",
    dtype: str | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> ConversionResult:
    """Convert the checkpoint in the folder `source` into the folder `out`, which appears complete or not at all.

    Args:
        source: an unquantised checkpoint with Hugging Face's or MLX's names.
        out: the folder to make; its parents are made too.
        recipe: how each matrix is stored, or the name of such a recipe.
        dtype: type of unquantised tensors and of affine scales; None takes ``torch_dtype`` of config.json and, where
            that is absent, each tensor's own. Expert biases are always float32.
        force: replace an `out` that is a model folder already.
        shard_bytes: most bytes of tensors in one file.
        progress: called at the start and after each tensor; what it raises ends the conversion.

    Raises:
        OptionError: a parameter has a value that is refused.
        CheckpointError: the source is missing something or damaged.
        ConfigError: the source's config.json holds a value that cannot be used.
        ConversionError: source or destination do not allow it, or writing failed; nothing is left behind.
    """
    started = time.perf_counter()
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    check_integer("shard_bytes", shard_bytes, minimum=1)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    try:
        notes = tidy(out)
        check_destination(source, out, force=force)
        job = _Job(_open_source(source), chosen, dtype)
        sidecars = find_sidecars(source)
        check_space(out, job.num_bytes + sum((source / file).stat().st_size for file in sidecars) + _SPARE_BYTES)
        shards = plan_shards(job.planned, shard_bytes)
        with staged(out) as folder:
            _write(job, folder, shards, sidecars, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConversionError(f"{error.filename or out}: {reason}; the conversion to {out} was given up") from error
    if not any((out / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        notes.append(f"{source} has no tokenizer.json: the converted folder cannot turn text into tokens")
    return ConversionResult(
        folder=out,
        source_bytes=job.source_bytes,
        num_bytes=job.num_bytes,
        num_parameters=job.num_parameters,
        num_shards=len(shards),
        elapsed_s=time.perf_counter() - started,
        notes=tuple(notes),
    )


def _open_source(source: Path) -> Checkpoint:
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder, expected a checkpoint with config.json and safetensors files")
    checkpoint = Checkpoint(source)
    stored = checkpoint.config.quantization
    if stored is not None:
        raise ConversionError(
            f"{source}: is quantised already ({stored.default.bits} bits, {stored.default.mode}), expected full "
            "precision; convert the original checkpoint"
        )
    return checkpoint


def _target_dtype(checkpoint: Checkpoint, requested: str | None) -> str | None:
    """The type to cast to; None leaves each tensor its own, as mlx-lm does when config.json has no ``torch_dtype``."""
    name = requested or str(checkpoint.config.raw.get("torch_dtype")).removeprefix("torch.")
    return name if name in DTYPES else None


class _Job:
    """What will be made of a checkpoint: every tensor's name, type and shape is known before any weight is read."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, dtype: str | None) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.dtype = _target_dtype(checkpoint, dtype)
        shapes = expected_tensors(checkpoint.config)
        self.stored_as = {name: recipe.of(name, shapes[name]) for name in checkpoint.names}
        self.num_parameters = sum(math.prod(shape) for shape in shapes.values())
        self.source_bytes = sum(checkpoint.stored_bytes(name) for name in checkpoint.names)
        self.planned = [
            PlannedTensor.of(name, array) for source in checkpoint.names for name, array in self.make(source).items()
        ]
        self.num_bytes = sum(tensor.num_bytes for tensor in self.planned)
        self._check_recipe()

    def make(self, name: str) -> dict[str, mx.array]:
        """The tensors written for our tensor `name`, unevaluated; asked for shapes alone, this reads no weight."""
        array = cast(name, self.checkpoint.tensor(name), self.dtype)
        how = self.stored_as[name]
        return {name: array} if how is None else quantize(name, array, how)

    def arrays(self, progress: Progress | None) -> Iterator[tuple[str, mx.array]]:
        """All tensors in the planned order, each evaluated just before it is handed out and not kept."""
        done_bytes = 0
        if progress is not None:
            progress(done_bytes, self.source_bytes)
        for source in self.checkpoint.names:
            yield from self._evaluated(source)
            mx.clear_cache()
            done_bytes += self.checkpoint.stored_bytes(source)
            if progress is not None:
                progress(done_bytes, self.source_bytes)

    def _evaluated(self, source: str) -> Iterator[tuple[str, mx.array]]:
        made = self.make(source)
        try:
            if self.dtype == "float16":
                check_float16(source, self.checkpoint.tensor(source))
            mx.eval(made)
        except RuntimeError as error:
            raise CheckpointError(f"{source}: cannot be read ({error}); fetch the checkpoint again") from error
        for name in list(made):
            yield name, made.pop(name)

    def overrides(self) -> dict[str, Quantization]:
        """The matrices that are stored in another way than most, by module path."""
        default = self.recipe.default
        return {
            name.removesuffix(".weight"): how
            for name, how in self.stored_as.items()
            if how is not None and how is not default
        }

    def _check_recipe(self) -> None:
        default = self.recipe.default
        if default is not None and not any(self.stored_as.values()):
            raise ConversionError(
                f"{self.checkpoint.folder}: no matrix has rows that divide into groups of {default.group_size}; "
                "choose a smaller --group-size, or --no-quantize"
            )


def _write(job: _Job, folder: Path, shards: tuple[Shard, ...], sidecars: list[Path], progress: Progress | None) -> None:
    """Fill `folder`, config.json last, and check that it loads."""
    write_shards(folder, shards, job.arrays(progress))
    write_index(folder, shards, job.num_parameters)
    copy_sidecars(job.checkpoint.folder, folder, sidecars)
    config = config_json(job.checkpoint.config, job.recipe.default, job.overrides(), job.dtype)
    write_json(folder / "config.json", config)
    verify(folder, job.planned)
