"""A checkpoint in, a converted folder out: planned, shared among processes, checked, and safe to interrupt."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lfm_mlx.checkpoint import Checkpoint
from lfm_mlx.config import ModelConfig
from lfm_mlx.errors import CheckpointError, ConversionError, LfmError, OptionError
from lfm_mlx.tokenizer import load_tokenizer, tool_problems
from lfm_mlx.types import check_integer

from .calibration import calibrate, read_text
from .card import write_card
from .feed import Feed, LocalFeed
from .gguf_source import GgufSource
from .hashing import Hasher
from .job import Job, describe
from .journal import Journal
from .manifest import write_manifest
from .piecework import digest_of
from .quantize import DTYPES
from .recipes import Recipe, recipe_named
from .segments import CheckpointSource, Segment, WeightSource
from .sidecars import config_json, copy_sidecars, find_sidecars, write_sidecars
from .staging import check_destination, check_space, find_progress, staged, tidy
from .tasks import TASK_BYTES, Task
from .verify import verify
from .workers import do_tasks
from .write import SHARD_BYTES, allocate, write_index, write_json

Progress = Callable[[int, int], None]
"""Called at the start and after each task with the source bytes converted so far and the bytes there are in all."""

_SPARE_BYTES = 1 << 20
"""Room asked for beyond tensors and copied files: headers, index, config.json."""

_BYTES_PER_WORKER = 256 << 20
"""A source of fewer bytes is not worth the start of one more process."""

_AHEAD_BYTES = 1 << 30
"""How far hashing the source may run ahead of converting it."""


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
    source: Path | str,
    out: Path | str,
    *,
    recipe: Recipe | str = "4bit",
    dtype: str | None = None,
    rounding: str | None = None,
    calibration: Path | str | None = None,
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
        source: a checkpoint with Hugging Face's or MLX's names, or a GGUF file.
        out: the folder to make; its parents are made too.
        recipe: how each matrix is stored, or the name of such a recipe, or the path of a recipe file.
        dtype: type of unquantised tensors and of affine scales; None takes ``torch_dtype`` of config.json and, where
            that is absent, each tensor's own. Expert biases are always float32.
        rounding: ``minmax`` or ``search``; None takes the recipe's.
        calibration: a file of text; the search weighs the error of each column by what it gets as input there.
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
    chosen = recipe_named(recipe) if isinstance(recipe, str) else recipe
    if calibration is not None:
        if rounding == "minmax":
            raise OptionError(
                "calibration weighs the search for scales, but rounding is 'minmax'; leave one of them out"
            )
        rounding = "search"
    chosen = chosen if rounding is None else replace(chosen, rounding=rounding)
    for name, value in (("shard_bytes", shard_bytes), ("task_bytes", task_bytes)):
        check_integer(name, value, minimum=1)
    if jobs is not None:
        check_integer("jobs", jobs, minimum=1, maximum=256)
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    source, out = Path(source).expanduser().resolve(), Path(out).expanduser().resolve()
    stack = contextlib.ExitStack()
    try:
        notes = tidy(out, keep_progress=resume)
        check_destination(source, out, force=force)
        weights = _open_source(source, requantize=requantize)
        importance = stack.enter_context(_measured(source, out, calibration))
        job = Job(weights, chosen, dtype=dtype, shard_bytes=shard_bytes, task_bytes=task_bytes, importance=importance)
        root = source if source.is_dir() else source.parent
        sidecars = find_sidecars(root) if source.is_dir() else []
        if isinstance(weights, GgufSource) and weights.block_types:
            lost = ", ".join(weights.block_types)
            notes.append(f"{source} holds {lost}: precision that was lost there does not come back")
        if not resume or find_progress(out) is None:
            needed = job.num_bytes + sum((root / file).stat().st_size for file in sidecars) + _SPARE_BYTES
            check_space(out, needed)
        if on_plan is not None:
            on_plan(job)
        run = _Run(job, root, source, LocalFeed(root, weights.files))
        with staged(out, resume=resume, keeps=_can_go_on) as folder:
            run.fill(folder, sidecars, _num_workers(job, jobs), progress)
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
        num_resumed_tasks=run.num_resumed,
        num_tasks=len(job.tasks),
        elapsed_s=time.perf_counter() - started,
        notes=tuple(notes),
    )


@contextlib.contextmanager
def _measured(source: Path, out: Path, calibration: Path | str | None) -> Iterator[dict[str, Segment] | None]:
    """What a calibration found, in a file that lives as long as the block."""
    if calibration is None:
        yield None
        return
    if not source.is_dir():
        raise OptionError(f"calibration needs the unquantised model in a folder, but {source} is a file")
    text = read_text([Path(calibration).expanduser()])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.calibration-", dir=out.parent) as folder:
        yield calibrate(source, text, Path(folder) / "columns")


def _tokenizer_notes(source: Path, out: Path, config: ModelConfig) -> list[str]:
    if not any((out / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return [f"{source} has no tokenizer.json: the converted folder cannot turn text into tokens"]
    try:
        tokenizer = load_tokenizer(out, config_eos_ids=config.eos_token_ids, model_vocab_size=config.vocab_size)
    except CheckpointError as error:
        return [f"the tokenizer cannot be used: {error}"]
    return tool_problems(tokenizer, config.vocab_size)


def _open_source(source: Path, *, requantize: bool) -> WeightSource:
    if source.is_file() and source.suffix == ".gguf":
        return GgufSource(source)
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder, expected a checkpoint with config.json and safetensors files")
    checkpoint = Checkpoint(source)
    stored = checkpoint.config.quantization
    if stored is not None and not requantize:
        raise ConversionError(
            f"{source}: is quantised already ({stored.default.bits} bits, {stored.default.mode}), expected full "
            "precision; convert the original checkpoint, or accept the loss with --requantize (requantize=True)"
        )
    return CheckpointSource(checkpoint)


def _num_workers(job: Job, jobs: int | None) -> int:
    if jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = min(cores, 1 + job.source_bytes // _BYTES_PER_WORKER)
    return max(1, min(jobs, len(job.tasks)))


def _can_go_on(error: BaseException) -> bool:
    """Whether a later run can go on after this: not where the source or a value in it was at fault."""
    return not isinstance(error, LfmError) or isinstance(error, ConversionError)


class _Run:
    """One attempt at a job."""

    def __init__(self, job: Job, source: Path, named: Path, feed: Feed) -> None:
        self.job = job
        self.source = source
        self.named = named
        self.feed = feed
        self.num_resumed = 0

    def fill(self, folder: Path, sidecars: Sequence[Path], num_workers: int, progress: Progress | None) -> None:
        """Fill `folder`, config.json and the manifest last, and check that it loads."""
        job = self.job
        identity = {
            "source": self.feed.identity,
            **describe(job),
            "plan": job.fingerprint(self.source),
        }
        is_new = not (folder / ".journal").is_file()
        journal = Journal.begin(folder, identity) if is_new else Journal.resume(folder, identity)
        allocate(folder, job.shards)
        self._check_done(journal, folder)
        self._do_tasks(journal, folder, num_workers, progress)
        for shard in job.shards:
            _sync(folder / shard.file)
        write_index(folder, job.shards, job.num_parameters)
        copy_sidecars(self.source, folder, sidecars)
        if isinstance(job.source, GgufSource):
            write_sidecars(folder, job.source.sidecars())
        config = config_json(job.source.config, job.recipe.default, job.overrides(), job.dtype)
        write_json(folder / "config.json", config)
        verify(folder, job.planned)
        write_card(folder, self.named, describe(job), job.num_bytes, job.bits_per_weight)
        write_manifest(folder, self.source, sidecars, journal.inputs, describe(job))
        journal.remove()

    def _check_done(self, journal: Journal, folder: Path) -> None:
        """Forget the tasks whose work is not there as it was."""
        for task in self.job.tasks:
            if task.number in journal.tasks and digest_of(task, folder) != journal.tasks[task.number]:
                del journal.tasks[task.number]
        self.num_resumed = len(journal.tasks)

    def _do_tasks(self, journal: Journal, folder: Path, num_workers: int, progress: Progress | None) -> None:
        job, total = self.job, self.job.source_bytes
        todo = [task for task in job.tasks if task.number not in journal.tasks]
        left = Counter(task.file for task in todo)
        done_bytes = total - sum(task.source_bytes for task in todo)
        if progress is not None:
            progress(done_bytes, total)
        hashed = {self.source / name for name in journal.inputs}
        hasher = Hasher(lambda file, size, digest: journal.add_input(str(file.relative_to(self.source)), size, digest))
        with contextlib.closing(_Closing(hasher.stop)):
            order = _Order(job.source.files, self.feed, hasher, hashed)
            for done in do_tasks(order.dispatch(todo), folder, num_workers):
                journal.add_task(done.task.number, done.digest)
                done_bytes += done.task.source_bytes
                left[done.task.file] -= 1
                if not left[done.task.file]:
                    self.feed.check(done.task.file)
                if progress is not None:
                    progress(done_bytes, total)
            order.finish()
        for file in job.source.files:
            self.feed.check(file)


class _Closing:
    """Lets `contextlib.closing` call any function."""

    def __init__(self, close: Callable[[], None]) -> None:
        self.close = close


class _Order:
    """Hands out tasks in the order of the source's files and lets these be hashed along with it."""

    def __init__(self, files: Sequence[Path], feed: Feed, hasher: Hasher, hashed: set[Path]) -> None:
        self.files = list(files)
        self.feed = feed
        self.hasher = hasher
        self.hashed = hashed
        self.opened_bytes = 0

    def dispatch(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """The tasks, each once its file is there."""
        for task in tasks:
            self._open_to(task.file)
            self.hasher.allow(self.opened_bytes + task.pieces[-1].reads[-1].offset + _AHEAD_BYTES)
            yield task

    def finish(self) -> None:
        """Hash what no task has asked for."""
        if self.files:
            self._open_to(self.files[-1])
        self.hasher.finish()

    def _open_to(self, file: Path) -> None:
        while file in self.files:
            opened = self.files.pop(0)
            self.feed.ensure(opened)
            if opened not in self.hashed:
                self.hasher.add([opened])


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
