"""A checkpoint in, a converted folder out: planned, shared among processes, checked, and safe to interrupt."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig, read_config
from lfm_mlx.errors import CheckpointError, ConversionError, DownloadError, LfmError, OptionError
from lfm_mlx.hub_weights import RemoteCheckpoint
from lfm_mlx.tokenizer import load_tokenizer, tool_problems
from lfm_mlx.types import check_integer

from .attempt import Attempt, Progress
from .feed import Feed, LocalFeed
from .gguf_source import GgufSource
from .job import Job
from .preparation import Wish, check_readable, check_streamed
from .quantize import DTYPES
from .recipes import Recipe, recipe_named
from .remote import RemoteFeed, RemoteSource, download_folder, has_downloads
from .segments import CheckpointSource, WeightSource
from .sidecars import find_sidecars
from .staging import check_destination, check_space, find_progress, staged, tidy
from .tasks import TASK_BYTES
from .write import SHARD_BYTES

_SPARE_BYTES = 1 << 20
"""Room asked for beyond tensors and copied files: headers, index, config.json."""

_BYTES_PER_WORKER = 256 << 20
"""A source of fewer bytes is not worth the start of one more process."""


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """What a conversion made.

    Args:
        folder: the finished checkpoint.
        source_bytes: bytes of the tensors that were read.
        num_bytes: bytes of the tensors that were written.
        num_parameters: values of the unquantised model.
        num_shards: files of weights.
        num_resumed_tasks: tasks of an interrupted run that did not have to be done again.
        num_tasks: tasks in all.
        elapsed_s: wall-clock seconds.
        notes: what the caller may want to know: files that were missing, leftovers that were removed.
    """

    folder: Path
    source_bytes: int
    num_bytes: int
    num_parameters: int
    num_shards: int
    elapsed_s: float
    num_resumed_tasks: int = 0
    num_tasks: int = 0
    notes: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Bits written for each value of the model."""
        return 8 * self.num_bytes / self.num_parameters


def convert(
    source: Path | str | RemoteCheckpoint,
    out: Path | str,
    *,
    recipe: Recipe | str | None = None,
    dtype: str | None = None,
    rounding: str | None = None,
    calibration: Path | str | None = None,
    target_bpw: float | None = None,
    discard_source: bool = False,
    force: bool = False,
    resume: bool = False,
    requantize: bool = False,
    jobs: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    task_bytes: int = TASK_BYTES,
    on_plan: Callable[[Job], None] | None = None,
    progress: Progress | None = None,
) -> ConversionResult:
    """Convert the checkpoint in the folder `source` into the folder `out`, which appears complete or not at all.

    An interrupted conversion leaves a folder beside `out` from which `resume` goes on.

    Args:
        source: a checkpoint with Hugging Face's or MLX's names, a GGUF file, or a repo's checkpoint, whose files are
            downloaded while others are converted.
        out: the folder to make; its parents are made too.
        recipe: how each matrix is stored, or the name of such a recipe, or the path of a recipe file; None is "4bit".
        dtype: type of unquantised tensors and of affine scales; None takes ``torch_dtype`` of config.json and, where
            that is absent, each tensor's own. Expert biases are always float32.
        rounding: ``minmax`` or ``search``; None takes the recipe's.
        calibration: a file of text; the search weighs the error of each column by what it gets as input there.
        target_bpw: bits per weight, instead of a recipe: one is made in which bytes go where they save most, by what
            each matrix loses on the text of `calibration`, or by its relative error where there is none.
        discard_source: download a repo's files beside `out` and delete each once it is converted: of the source no more
            than two files are on the disk. What was downloaded before is used and stays.
        force: replace an `out` that is a model folder already.
        resume: go on with what an interrupted conversion left, after checking it; start anew where there is nothing.
        requantize: accept a source that is quantised already, although precision that is lost does not come back.
        jobs: processes that share the work; None takes the machine's cores, fewer for a small source. The result is
            the same for any number.
        shard_bytes: most bytes of tensors in one file.
        task_bytes: bytes of the source that a process converts in one go, and that an interruption costs at most.
        on_plan: called once all sizes are known, before anything is written.
        progress: called at the start and after each task; what it raises ends the conversion.

    Raises:
        OptionError: a parameter has a value that is refused.
        CheckpointError: the source is missing something, damaged, or was changed while it was read.
        ConfigError: the source's config.json holds a value that cannot be used.
        ConversionError: source or destination do not allow it, a worker died, or writing failed.
    """
    started = time.perf_counter()
    for name, value in (("shard_bytes", shard_bytes), ("task_bytes", task_bytes)):
        check_integer(name, value, minimum=1)
    if jobs is not None:
        check_integer("jobs", jobs, minimum=1, maximum=256)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    wish = Wish(
        recipe=recipe_named(recipe) if isinstance(recipe, str) else recipe,
        dtype=dtype,
        rounding=rounding,
        calibration=None if calibration is None else Path(calibration).expanduser(),
        target_bpw=target_bpw,
        shard_bytes=shard_bytes,
        task_bytes=task_bytes,
    )
    out = Path(out).expanduser().resolve()
    remote = source if isinstance(source, RemoteCheckpoint) else None
    source = remote.folder if remote is not None else Path(source).expanduser().resolve()  # type: ignore[arg-type]
    if discard_source and remote is None:
        raise OptionError(
            f"discard_source deletes files of a repo once they are converted, but {source} is a path of yours; leave "
            "it out, nothing there is ever deleted"
        )
    stack = contextlib.ExitStack()
    try:
        downloads = None if remote is None else download_folder(out, remote)
        notes = tidy(out, keep_progress=resume, keep=downloads)
        check_destination(source, out, force=force)
        _check_quantization(source, requantize=requantize)
        if remote is not None and downloads is not None:
            check_streamed(wish)
            stack.enter_context(_kept_for_later(downloads))
            at_hub = RemoteSource(remote, downloads)
            weights: WeightSource = at_hub
            feed: Feed = RemoteFeed(at_hub, discard=discard_source)
        else:
            weights = _open_source(source)
            feed = LocalFeed(source if source.is_dir() else source.parent, weights.files)
        check_readable(wish, source, weights.config)
        job = wish.plan(weights, source, out, stack.enter_context(_scratch(out, wish)), resume=resume)
        root = source if source.is_dir() else source.parent
        sidecars = find_sidecars(root) if source.is_dir() else []
        if isinstance(weights, GgufSource) and weights.block_types:
            lost = ", ".join(weights.block_types)
            notes.append(f"{source} holds {lost}: precision that was lost there does not come back")
        needed = job.num_bytes + sum((root / file).stat().st_size for file in sidecars) + _SPARE_BYTES
        is_begun = resume and find_progress(out) is not None
        beside, cached = feed.room_bytes()
        check_space(out, beside + (0 if is_begun else needed), cache=root if cached else None, cache_bytes=cached)
        if on_plan is not None:
            on_plan(job)
        texts = [] if wish.calibration is None else [wish.calibration]
        attempt = Attempt(job, root, source, feed, texts)
        with staged(out, resume=resume, keeps=_can_go_on) as folder:
            attempt.fill(folder, sidecars, _num_workers(job, jobs), progress)
    except DownloadError as error:
        kept = "; then go on with --resume (resume=True)" if find_progress(out) else ""
        raise DownloadError(f"{error}{kept}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        kept = "; free the cause and go on with --resume (resume=True)" if find_progress(out) else ""
        raise ConversionError(
            f"{error.filename or out}: {reason}; the conversion to {out} was given up{kept}"
        ) from error
    finally:
        stack.close()
    notes += _tokenizer_notes(source, out, weights.config)
    return ConversionResult(
        folder=out,
        source_bytes=job.source_bytes,
        num_bytes=job.num_bytes,
        num_parameters=job.num_parameters,
        num_shards=len(job.shards),
        num_resumed_tasks=attempt.num_resumed,
        num_tasks=len(job.tasks),
        elapsed_s=time.perf_counter() - started,
        notes=tuple(notes),
    )


@contextlib.contextmanager
def _scratch(out: Path, wish: Wish) -> Iterator[Path | None]:
    """A folder beside `out` for what a calibration finds; it lives as long as the block."""
    if wish.calibration is None:
        yield None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.calibration-", dir=out.parent) as folder:
        yield Path(folder)


def _tokenizer_notes(source: Path, out: Path, config: ModelConfig) -> list[str]:
    if not any((out / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return [f"{source} has no tokenizer.json: the converted folder cannot turn text into tokens"]
    try:
        tokenizer = load_tokenizer(out, config_eos_ids=config.eos_token_ids, model_vocab_size=config.vocab_size)
    except CheckpointError as error:
        return [f"the tokenizer cannot be used: {error}"]
    return tool_problems(tokenizer, config.vocab_size)


def _check_quantization(source: Path, *, requantize: bool) -> None:
    if not source.is_dir():
        return
    stored = read_config(source).quantization
    if stored is not None and not requantize:
        raise ConversionError(
            f"{source}: is quantised already ({stored.default.bits} bits, {stored.default.mode}), expected full "
            "precision; convert the original checkpoint, or accept the loss with --requantize (requantize=True)"
        )


def _open_source(source: Path) -> WeightSource:
    if source.is_file() and source.suffix == ".gguf":
        return GgufSource(source)
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder, expected a checkpoint with config.json and safetensors files")
    return CheckpointSource(Checkpoint(source))


@contextlib.contextmanager
def _kept_for_later(downloads: Path) -> Iterator[None]:
    """Removes the folder at the end of the block, after an error only if nothing in it is worth keeping."""
    try:
        yield
    except BaseException:
        if not has_downloads(downloads):
            shutil.rmtree(downloads, ignore_errors=True)
        raise
    shutil.rmtree(downloads, ignore_errors=True)


def _num_workers(job: Job, jobs: int | None) -> int:
    if jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = min(cores, 1 + job.source_bytes // _BYTES_PER_WORKER)
    return max(1, min(jobs, len(job.tasks)))


def _can_go_on(error: BaseException) -> bool:
    """Whether a later run can go on after this: not where the source or a value in it was at fault."""
    return not isinstance(error, LfmError) or isinstance(error, (ConversionError, DownloadError))
