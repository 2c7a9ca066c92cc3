"""The commands: each parses its flags and calls one public function."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from lfm_mlx import __version__
from lfm_mlx.distributed import check_alone, is_first_rank
from lfm_mlx.engine import follow
from lfm_mlx.errors import OptionError
from lfm_mlx.generate import Statistics, TokenStream, check_options, stream
from lfm_mlx.load import DEFAULT_MODEL, DTYPES, Loaded, LoadProgress, load
from lfm_mlx.terminal import INTERRUPTED, format_bytes, run
from lfm_mlx.types import Tool

SHOW_LOADING_FROM_BYTES = 500_000_000
"""Below this, weights are in memory before a progress line could be read."""

_LAZY_COMMANDS = {
    "bench": "lfm_mlx.bench.__main__",
    "chat": "lfm_mlx.chat.__main__",
    "convert": "lfm_mlx.convert.__main__",
    "server": "lfm_mlx.server.__main__",
}
"""Commands whose modules are imported only when they are called."""


class _Commands(click.Group):
    """The command group; some commands are imported on first use so that `generate` starts fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LAZY_COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY_COMMANDS:
            command = importlib.import_module(_LAZY_COMMANDS[cmd_name]).command
            assert isinstance(command, click.Command)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="lfm-mlx")
def group() -> None:
    """Run Liquid AI's LFM2 and LFM2.5 models on this machine."""


model_option = click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Folder or repo id.")

_GENERATION_OPTIONS = (
    click.option("--max-tokens", type=int, help="At most so many tokens [default: what the context holds]."),
    click.option("--temp", "temperature", type=float, help="Temperature; 0 is greedy [default: the model card's]."),
    click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this total probability."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one's probability."),
    click.option("--repetition-penalty", type=float, help="Above 1 discourages tokens seen before."),
    click.option("--presence-penalty", type=float, help="Subtracted from tokens generated before."),
    click.option("--frequency-penalty", type=float, help="Subtracted for each time a token was generated."),
    click.option("--penalty-window", type=int, help="Latest tokens the penalties look at [default: all]."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
)
_LOADING_OPTIONS = (
    click.option("--max-context", type=int, help="Tokens a conversation may hold [default: what the model allows]."),
    click.option("--kv-bits", type=int, help="Keep keys and values in 8 or 4 bits."),
    click.option("--dtype", type=click.Choice(list(DTYPES)), help="Compute dtype [default: what suits the device]."),
    click.option("--revision", help="Branch, tag or commit of the repo."),
    click.option("--subfolder", help="Folder in the repo that holds the precision wanted."),
    click.option("--tensor-parallel", type=click.IntRange(1), help="Ranks that share every matrix, under mlx.launch."),
    click.option("--expert-parallel", type=click.IntRange(1), help="The same, with experts dealt out whole."),
    click.option("--offline", is_flag=True, help="Use only what was downloaded before."),
)


def generation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How tokens are drawn and how many; the command receives those that were given as `generation`."""
    return _gathered(function, "generation", _GENERATION_OPTIONS)


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How the model is loaded; the command receives those that were given as `loading`, for `load_model`.

    On a rank other than 0 the command itself is not called: the rank follows rank 0 until that ends.
    """

    @functools.wraps(function)
    def entering(**values: Any) -> Any:
        if not is_parallel(values["loading"]):
            if values.get("data_parallel", 1) == 1:
                replicas = ["--data-parallel"] * ("data_parallel" in values)
                check_alone("--tensor-parallel", "--expert-parallel", *replicas)
            return function(**values)
        if is_first_rank():
            return function(**values)
        loaded = load(values["model"], **values["loading"])
        follow(loaded.model)
        return 0

    return _gathered(entering, "loading", _LOADING_OPTIONS)


def is_parallel(loading: Mapping[str, Any]) -> bool:
    """Whether the options ask for several ranks."""
    return bool(max(loading.get("tensor_parallel", 1), loading.get("expert_parallel", 1)) > 1)


def _gathered(
    function: Callable[..., Any], into: str, options: Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Callable[..., Any]:
    """`function` with further options, whose values it receives as one dict."""

    @functools.wraps(function)
    def gathering(**values: Any) -> Any:
        given = {name: value for name in names if (value := values.pop(name)) is not None}
        return function(**values, **{into: given})

    num_before = len(getattr(function, "__click_params__", ()))
    for option in reversed(options):
        option(gathering)
    params: list[click.Parameter] = gathering.__click_params__  # type: ignore[attr-defined]
    names = [str(param.name) for param in params[num_before:]]
    return gathering


@group.command()
@model_option
@click.option("--prompt", help="The prompt; - reads it from standard input.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="File that holds the prompt.")
@click.option("--system", help="System message.")
@click.option("--tools", type=click.Path(path_type=Path), help="JSON file with a list of tools to show the model.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, without chat template.")
@generation_options
@click.option("--stop", multiple=True, help="String that ends the answer; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line instead of the text.")
@loading_options
def generate(
    model: str,
    prompt: str | None,
    prompt_file: Path | None,
    system: str | None,
    tools: Path | None,
    raw: bool,
    generation: dict[str, Any],
    stop: Sequence[str],
    as_json: bool,
    loading: dict[str, Any],
) -> int:
    """Answer one prompt; the text goes to standard output, speed and memory to standard error."""
    if prompt == "-" and is_parallel(loading):
        raise OptionError("--prompt is -, but mlx.launch never ends standard input; use --prompt-file")
    text = _read_prompt(prompt, prompt_file)
    shown = _read_tools(tools) if tools is not None else None
    options = {"stop": stop, **generation}
    check_options(**options)  # Loading may take a minute.
    loaded = load_model(model, **loading)
    tokens = stream(*loaded, text, system=system, tools=shown, raw=raw, **options)
    return _print_stream(tokens, model, as_json)


def load_model(model: str, **loading: Any) -> Loaded:
    """`load`, with its progress shown where it takes long; arguments and errors are the same."""
    return load(model, **loading, on_progress=_show_loading)


def _print_stream(tokens: TokenStream, model: str, as_json: bool) -> int:
    parts: list[str] = []
    is_interrupted = False
    try:
        for token in tokens:
            parts.append(token.text)
            if not as_json:
                click.echo(token.text, nl=False)
    except KeyboardInterrupt:
        is_interrupted = True
    statistics = tokens.statistics
    if as_json:
        click.echo(json.dumps(_as_json(statistics, "".join(parts), model, is_interrupted), ensure_ascii=False))
    else:
        click.echo()
        _print_statistics(statistics)
    return INTERRUPTED if is_interrupted else 0


def _print_statistics(statistics: Statistics) -> None:
    click.echo(
        f"prompt: {statistics.prompt_tokens} tokens, {statistics.prompt_tokens_per_s:.1f} tokens/s; "
        f"answer: {statistics.generated_tokens} tokens, {statistics.generated_tokens_per_s:.1f} tokens/s; "
        f"peak memory: {format_bytes(statistics.peak_memory_bytes)}",
        err=True,
    )


def _as_json(statistics: Statistics, text: str, model: str, is_interrupted: bool) -> dict[str, Any]:
    return {
        "model": model,
        "text": text,
        "finish_reason": "cancelled" if is_interrupted else statistics.finish_reason,
        "prompt_tokens": statistics.prompt_tokens,
        "generated_tokens": statistics.generated_tokens,
        "time_to_first_token_s": round(statistics.prompt_s, 6),
        "prompt_tokens_per_s": round(statistics.prompt_tokens_per_s, 3),
        "generated_tokens_per_s": round(statistics.generated_tokens_per_s, 3),
        "peak_memory_bytes": statistics.peak_memory_bytes,
        "seed": statistics.seed,
    }


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give either --prompt TEXT (- for standard input) or --prompt-file FILE")
    if prompt_file is not None:
        return read_text(prompt_file)
    if prompt == "-":
        return read_standard_input()
    assert prompt is not None
    return prompt


def read_text(path: Path) -> str:
    """A file's text. Raises OptionError if it cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    return _decoded(data, str(path))


def read_standard_input() -> str:
    """All of standard input as text. Raises OptionError if it is not UTF-8."""
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{source}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; convert the text to UTF-8"
        ) from error


def _read_tools(path: Path) -> list[Tool]:
    text = read_text(path)
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: is not JSON ({error}); expected a list of tools") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise OptionError(f"{path}: expected a JSON list of tools, each an object with name and parameters")
    return tools


def _show_loading(progress: LoadProgress) -> None:
    if progress.total_bytes < SHOW_LOADING_FROM_BYTES or not sys.stderr.isatty():
        return
    done, total = min(progress.done_bytes, progress.total_bytes), progress.total_bytes
    left_s = progress.elapsed_s * (total - done) / max(done, 1)
    line = f"\rloading {format_bytes(done)} of {format_bytes(total)}, {left_s:.0f} s left"
    click.echo("\r" + " " * 60 + "\r" if done == total else f"{line:<60}", nl=False, err=True)


def main() -> None:
    """The ``lfm-mlx`` program."""
    run(group, "lfm-mlx")
