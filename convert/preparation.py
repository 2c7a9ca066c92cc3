"""From a wish to a job: what a text tells about the weights, and the recipe that meets a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import ConversionError, OptionError

from .calibration import calibrate, read_text
from .hashing import sha256_of
from .job import Job, written_dtype
from .journal import conversion_in
from .recipes import Recipe, parse_recipe, recipe_named
from .segments import WeightSource
from .sensitivity import Sensitivity, measure_sensitivity
from .staging import find_progress
from .target import find_recipe
from .tasks import TASK_BYTES
from .write import SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a conversion is to make; the fields are the arguments of `lfm_mlx.convert.convert`.

    Raises:
        OptionError: two of them contradict each other.
    """

    recipe: Recipe | str | None = None
    dtype: str | None = None
    rounding: str | None = None
    calibration: Path | None = None
    target_bpw: float | None = None
    shard_bytes: int = SHARD_BYTES
    task_bytes: int = TASK_BYTES

    def __post_init__(self) -> None:
        if self.calibration is not None and self.rounding == "minmax":
            raise OptionError(
                "calibration weighs the search for scales, but rounding is 'minmax'; leave one of them out"
            )
        if self.target_bpw is not None and self.recipe is not None:
            raise OptionError("target_bpw finds a recipe of its own, but a recipe is given; leave one of them out")
        target = self.target_bpw
        if target is not None and (isinstance(target, bool) or not isinstance(target, (int, float)) or target <= 0):
            raise OptionError(f"target_bpw is {target!r}, expected bits per weight such as 4.5")

    def plan(self, source: WeightSource, folder: Path, out: Path, scratch: Path | None, *, resume: bool) -> Job:
        """The job that fulfils the wish.

        Args:
            source: the checkpoint.
            folder: where it is.
            out: the destination, to find what an interrupted conversion has found out.
            scratch: a folder for what a calibration finds; it is needed as long as the job is.
            resume: take over the recipe that an interrupted conversion to `out` found for the same size.
        """
        importance, found = None, dict[str, Any]()
        if self.calibration is not None:
            assert scratch is not None
            importance = calibrate(folder, read_text([self.calibration]), scratch / "columns")
            found["text"] = sha256_of(self.calibration)
        if self.target_bpw is not None:
            found["target_bpw"] = float(self.target_bpw)
        return Job(
            source,
            self._recipe(source, folder, find_progress(out) if resume else None, found),
            dtype=self.dtype,
            shard_bytes=self.shard_bytes,
            task_bytes=self.task_bytes,
            importance=importance,
            found=found,
        )

    def _recipe(self, source: WeightSource, folder: Path, partial: Path | None, found: Mapping[str, Any]) -> Recipe:
        if self.target_bpw is None:
            given = "4bit" if self.recipe is None else self.recipe
            recipe = recipe_named(given) if isinstance(given, str) else given
            rounding = "search" if self.calibration is not None else self.rounding
            return recipe if rounding is None else replace(recipe, rounding=rounding)
        rounding = self.rounding or "search"
        earlier = {} if partial is None else conversion_in(partial)
        if found.items() <= earlier.items() and earlier["recipe"]["rounding"] == rounding:
            return parse_recipe(earlier["recipe"], "found before")
        dtypes = {name: written_dtype(source, self.dtype, name) for name in source.tensors}
        sensitivities = self._sensitivities(folder)
        return find_recipe(source, dtypes, sensitivities, target_bpw=self.target_bpw, rounding=rounding)

    def _sensitivities(self, folder: Path) -> Mapping[str, Sequence[Sensitivity]] | None:
        if self.calibration is None:
            return None
        return measure_sensitivity(folder, read_text([self.calibration]))


def check_readable(wish: Wish, source: Path, config: ModelConfig) -> None:
    """Refuse to measure on a source that can only be converted.

    Raises:
        OptionError: a text is given, but the source is a single file.
        ConversionError: a size is wished, but the source is quantised already.
    """
    if wish.calibration is not None and not source.is_dir():
        raise OptionError(f"calibration needs the unquantised model in a folder, but {source} is a file")
    if wish.target_bpw is not None and config.quantization is not None:
        raise ConversionError(
            f"{source}: is quantised already, expected full precision: what each matrix would lose cannot be measured; "
            "convert the original checkpoint"
        )


def check_streamed(wish: Wish) -> None:
    """Refuse what reads the source more than once, where its files come and go.

    Raises:
        OptionError: something of that kind is wished.
    """
    for name, value in (("calibration", wish.calibration), ("target_bpw", wish.target_bpw)):
        if value is not None:
            raise OptionError(
                f"{name} reads the whole source before it is converted, but it is still at the hub; download it first "
                "(hf download), and convert the folder"
            )
