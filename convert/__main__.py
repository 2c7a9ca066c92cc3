"""``python -m lfm_mlx.convert --model SRC --out DST``: the converter's command line."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lfm_mlx.config import ModelConfig, read_config, read_json_object
from lfm_mlx.errors import ConversionError, OptionError
from lfm_mlx.hub import check_can_upload, fetch, is_local, upload
from lfm_mlx.hub_weights import RemoteCheckpoint, open_remote
from lfm_mlx.terminal import format_bytes, run

from .attempt import Progress
from .card import NAME as CARD
from .card import write_card
from .conversion import ConversionResult, convert
from .job import Job, planned_size, values_in
from .manifest import add_to_manifest, check_manifest
from .quality import FILES, MAX_TOKENS, measure_quality, read_set, write_report
from .quantize import DTYPES
from .recipes import LARGE_CONFIG, RECIPES, ROUNDINGS, UNQUANTIZED, Recipe, recipe_named, uniform_recipe
from .staging import find_progress


class _Converter(click.Group):
    """A command with commands of its own: what is none of these may be meant as the checkpoint."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; an unknown name is told where a checkpoint goes."""
        if self.get_command(ctx, args[0]) is None and not ctx.resilient_parsing:
            ctx.fail(
                f"{args[0]!r} is none of the commands {', '.join(self.list_commands(ctx))}; "
                "a checkpoint goes behind --model, and the folder to make behind --out."
            )
        return super().resolve_command(ctx, args)


@click.group(name="convert", cls=_Converter, invoke_without_command=True, context_settings={"max_content_width": 110})
@click.option("--model", metavar="SRC", help="Folder or repo id of the checkpoint, or a GGUF file.  [required]")
@click.option("--out", metavar="DST", help="Folder to make.  [required]")
@click.option("--bits", type=int, help="Bits per weight: 2, 3, 4, 5, 6 or 8 in mode affine.  [default: 4]")
@click.option("--group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 64]")
@click.option("--mode", help="affine, mxfp4, nvfp4 or mxfp8.  [default: affine]")
@click.option("--recipe", metavar="NAME", help=f"Instead of the three above: {', '.join(RECIPES)}, or a JSON file.")
@click.option("--rounding", type=click.Choice(ROUNDINGS), help="How affine scales are found.  [default: the recipe's]")
@click.option("--calibrate", "calibration", metavar="FILE", help="Text; columns that get larger inputs weigh more.")
@click.option("--target-bpw", type=float, metavar="BITS", help="Bits per weight; a recipe is made for it.")
@click.option("--no-quantize", is_flag=True, help="Keep full precision; only names and layout change.")
@click.option("--dtype", help=f"Type of what stays unquantised: {', '.join(DTYPES)}.  [default: the source's]")
@click.option("--revision", help="Branch, tag or commit of the repo.")
@click.option("--subfolder", help="Folder in the repo that holds the checkpoint.")
@click.option("--offline", is_flag=True, help="Use only what was downloaded before.")
@click.option("--discard-source", is_flag=True, help="Delete each downloaded file of a repo once it is converted.")
@click.option("--force", is_flag=True, help="Replace DST if it is a model folder already.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted conversion to DST.")
@click.option("--requantize", is_flag=True, help="Accept a source that is quantised already.")
@click.option("--jobs", type=int, help="Processes that share the work.  [default: the machine's cores]")
@click.option("--report", "with_report", is_flag=True, help="Measure what was lost; see the command report.")
@click.option("--upload-repo", metavar="REPO", help="Upload DST to this repo of the hub when it is done.")
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
@click.pass_context
def command(
    context: click.Context,
    /,
    model: str | None,
    out: str | None,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    recipe: str | None,
    target_bpw: float | None,
    no_quantize: bool,
    revision: str | None,
    subfolder: str | None,
    offline: bool,
    with_report: bool,
    upload_repo: str | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert an LFM2 or LFM2.5 checkpoint for MLX; 4-bit weights in groups of 64 unless told otherwise.

    Expert routers keep 8 bits; expert biases, norms and convolution taps are never quantised. DST appears when it is
    complete, and mlx-lm loads it too.
    """
    if context.invoked_subcommand is not None:
        if given := [name for name in context.params if _is_given(context, name)]:
            raise click.UsageError(f"--{given[0]} does not go with {context.invoked_subcommand}")
        return
    if model is None or out is None:
        raise click.UsageError(f"Missing option '--{'model' if model is None else 'out'}'")
    chosen = _recipe(bits, group_size, mode, recipe, no_quantize, target_bpw)
    if upload_repo is not None:
        check_can_upload(upload_repo)
    reads_twice = target_bpw is not None or options["calibration"] is not None
    discard = options["discard_source"]
    if discard and (reads_twice or with_report):
        raise OptionError(
            "--discard-source deletes files once they are converted, but --calibrate, --target-bpw and --report read "
            "the source more than once; leave one of them out"
        )
    source: Path | RemoteCheckpoint
    if model.endswith(".gguf") and Path(model).expanduser().is_file():
        source = Path(model).expanduser()
    elif is_local(model) or offline or reads_twice:
        source = fetch(model, revision=revision, subfolder=subfolder, offline=offline)
    else:
        source = open_remote(model, revision=revision, subfolder=subfolder)
    with _ended_by_signals(out), _progress_bar(is_shown=not quiet) as progress:
        tell = None if quiet else (lambda job: click.echo(plan_line(job), err=True))
        result = convert(source, out, recipe=chosen, target_bpw=target_bpw, on_plan=tell, progress=progress, **options)
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    if not quiet:
        click.echo(_summary(result))
    if with_report:
        whole = source if isinstance(source, Path) else fetch(model, revision=revision, subfolder=subfolder)
        write_quality(whole, result.folder, None, MAX_TOKENS)
    if upload_repo is not None:
        click.echo(upload(result.folder, upload_repo))


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def plan_line(job: Job) -> str:
    """What a conversion will come to, in a line."""
    return (
        f"recipe {job.recipe.name}: {format_bytes(job.source_bytes)} -> {format_bytes(job.num_bytes)}, "
        f"{job.bits_per_weight:.3f} bits per weight"
    )


@command.command()
@click.option("--model", metavar="SRC", help="Folder or repo id.  [default: the geometry of LFM2.5-8B-A1B]")
def recipes(model: str | None) -> None:
    """List the recipes, with bits per weight and bytes for a model; no weight is read."""
    config = ModelConfig.from_dict(LARGE_CONFIG) if model is None else read_config(fetch(model, weights=False))
    for recipe in RECIPES.values():
        num_bytes, num_bits = planned_size(config, recipe)
        click.echo(
            f"{recipe.name:12} {num_bits:6.3f} bits per weight {format_bytes(num_bytes):>9}  {recipe.description}"
        )


@command.command()
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="DST")
@click.option("--dtype", help=f"Type of all values: {', '.join(DTYPES)}.  [default: the source's]")
@click.option("--force", is_flag=True, help="Replace DST if it is a model folder already.")
def dequantize(source: str, out: str, dtype: str | None, force: bool) -> None:
    """Write the quantised SRC unquantised into DST; what was lost does not come back."""
    folder = fetch(source)
    if read_config(folder).quantization is None:
        raise ConversionError(
            f"{folder}: is not quantised, expected a quantised checkpoint: there is nothing to dequantise; to change "
            "its names, layout or type, convert it with --no-quantize"
        )
    with _ended_by_signals(out):
        result = convert(folder, out, recipe=UNQUANTIZED, dtype=dtype, force=force, requantize=True)
    click.echo(_summary(result))


@command.command()
@click.argument("source", metavar="SRC", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.argument("folder", metavar="OUT", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option("--evaluation", type=click.Path(path_type=Path), help="JSON with texts and conversations of your own.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many texts and conversations of the set.")
@click.option("--max-tokens", type=click.IntRange(1), default=MAX_TOKENS, show_default=True, help="Of an answer.")
def report(source: Path, folder: Path, evaluation: Path | None, limit: int | None, max_tokens: int) -> None:
    """Compare OUT with the unquantised SRC and write QUALITY.md, quality.json and quality.svg into it."""
    write_quality(source.resolve(), folder.resolve(), evaluation, max_tokens, limit)


def write_quality(
    source: Path, folder: Path, evaluation: Path | None, max_tokens: int, limit: int | None = None
) -> None:
    """Measure, write the report, and say the result in a line."""
    chosen = {kind: items[:limit] for kind, items in read_set(evaluation).items()}
    quality = measure_quality(
        source,
        folder,
        evaluation=chosen,
        max_tokens=max_tokens,
        tell=lambda line: click.echo(f"report: {line}", err=True),
    )
    write_report(quality, folder)
    size = values_in(read_config(folder))
    manifest = read_json_object(folder / "manifest.json")
    if manifest is not None:
        write_card(folder, source, manifest["options"], quality.num_bytes, 8 * quality.num_bytes / size)
        add_to_manifest(folder, [*FILES, CARD])
    click.echo(
        f"{folder / FILES[0]}: KL {quality.text.kl_mean:.5f} on text"
        + (f", {quality.answers.kl_mean:.5f} on answers with tools" if quality.answers else "")
        + (f", {quality.calls.num_alike} of {quality.calls.num_calling} tool calls the same" if quality.calls else "")
    )


@command.command(name="upload")
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.argument("repo")
def upload_folder(folder: Path, repo: str) -> None:
    """Upload a converted FOLDER to REPO of the hub, after comparing it with its manifest."""
    check_can_upload(repo)
    check_manifest(folder)
    click.echo(upload(folder.resolve(), repo))


@command.command(name="verify")
@click.argument("folder", type=click.Path(path_type=Path))
def verify_files(folder: Path) -> None:
    """Compare every file of a converted FOLDER with the SHA-256 in its manifest."""
    click.echo(f"{folder}: {check_manifest(folder)} files are as the manifest says")


def _recipe(
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    name: str | None,
    no_quantize: bool,
    target_bpw: float | None,
) -> Recipe | None:
    """The recipe that the flags describe, None where it is still to be found; contradicting flags are refused."""
    detailed = {"--bits": bits, "--group-size": group_size, "--mode": mode}
    given = [flag for flag, value in detailed.items() if value is not None]
    alone = {"--recipe": name is not None, "--no-quantize": no_quantize, "--target-bpw": target_bpw is not None}
    given += [flag for flag, is_given in alone.items() if is_given]
    if len(given) > 1 and any(alone.values()):
        raise OptionError(f"{' and '.join(given)} exclude each other; keep one of them")
    if target_bpw is not None:
        return None
    if no_quantize:
        return UNQUANTIZED
    if name is not None:
        return recipe_named(name)
    return uniform_recipe(bits=bits, group_size=group_size, mode="affine" if mode is None else mode)


@contextlib.contextmanager
def _progress_bar(*, is_shown: bool) -> Iterator[Progress | None]:
    """A bar on standard error with bytes and time left; a log file gets one line instead."""
    if not is_shown:
        yield None
        return
    with contextlib.ExitStack() as stack:
        show: Callable[[int], None] | None = None

        def advance(done_bytes: int, total_bytes: int) -> None:
            nonlocal show
            show = show or _open_bar(stack, total_bytes)
            show(done_bytes)

        yield advance


def _open_bar(stack: contextlib.ExitStack, total_bytes: int) -> Callable[[int], None]:
    """Show an empty bar until `stack` closes; returns what moves it to a number of bytes."""
    total = format_bytes(total_bytes)

    def show_bytes(done_bytes: int | None) -> str:
        return f"{format_bytes(done_bytes or 0)} of {total}"

    bar = stack.enter_context(
        click.progressbar(length=total_bytes, label="converting", file=sys.stderr, item_show_func=show_bytes, width=24)
    )
    return lambda done_bytes: bar.update(done_bytes - bar.pos, done_bytes)


def _summary(result: ConversionResult) -> str:
    shards = "1 shard" if result.num_shards == 1 else f"{result.num_shards} shards"
    return (
        f"{result.folder}: {format_bytes(result.source_bytes)} -> {format_bytes(result.num_bytes)} in {shards}, "
        f"{result.bits_per_weight:.3f} bits per weight, {result.elapsed_s:.1f} s"
    )


class _SignalError(BaseException):
    """The process was asked to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def _raise_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise _SignalError(number)


@contextlib.contextmanager
def _ended_by_signals(out: str) -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, with a line about what is left; then the process ends."""
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]  # not under nohup
    for number in numbers:
        signal.signal(number, _raise_signal)
    try:
        yield
    except _SignalError as error:
        click.echo(f"stopped by {error}; {_left(out)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo(_left(out), err=True)
        raise
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _left(out: str) -> str:
    partial = find_progress(Path(out).expanduser().resolve())
    return "nothing was written" if partial is None else f"--resume goes on with {partial}"


if __name__ == "__main__":
    run(command, "python -m lfm_mlx.convert")
