"""``python -m lfm_mlx.bench [QUESTION]``: the bench's command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from lfm_mlx.bench.conversion_cost import ask_conversion_cost
from lfm_mlx.bench.decode_speed import ask_decode_speed
from lfm_mlx.bench.distributed_plan import ask_distributed_plan
from lfm_mlx.bench.distributed_run import ask_distributed_run
from lfm_mlx.bench.false_alarms import ask_false_alarms
from lfm_mlx.bench.host_time import ask_host_time
from lfm_mlx.bench.kernel_trials import ask_kernel_trials
from lfm_mlx.bench.launch_count import ask_launches
from lfm_mlx.bench.memory_use import ask_memory
from lfm_mlx.bench.peer import PEERS
from lfm_mlx.bench.plot import plot_decode, plot_serving
from lfm_mlx.bench.prefill_speed import ask_prefill_speed
from lfm_mlx.bench.report import Report
from lfm_mlx.bench.shapes import SHAPES, TAILS
from lfm_mlx.bench.subject import LARGE_SHAPES, Subject, default_shapes, has_room_for_peer
from lfm_mlx.distributed import check_alone, launched_world
from lfm_mlx.errors import OptionError
from lfm_mlx.terminal import format_bytes, run

# Questions that need numpy, grammars or HTTP are imported when they are asked, see `lfm_mlx.bench`.

MOST = 1_000_000
"""Larger numbers of tokens, rows or repeats are refused as slips."""


def read_numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read "1,4,16": whole numbers above 0."""
    if value is None:
        return None
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of whole numbers such as 1,4,16") from None
    if not all(1 <= number <= MOST for number in numbers):
        raise click.BadParameter(f"{value!r} holds a number outside 1 to {MOST:,}")
    return numbers


NUMBERS: Any = {"callback": read_numbers, "metavar": "N,N,..."}
"""What options of several numbers have in common."""

COUNT = click.IntRange(1, MOST)


def parallel_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that let ranks share the model; all of them then ask the question, and rank 0 reports."""
    function = click.option("--expert-parallel", type=COUNT, help="The same, with experts dealt out whole.")(function)
    told = "Ranks that share every matrix, under mlx.launch."
    return click.option("--tensor-parallel", type=COUNT, help=told)(function)


def subject_options(shapes: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that name the model; `shapes` is the default geometry, None what suits the machine."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        told = "what this machine can run in minutes" if shapes is None else shapes
        for option in (
            parallel_options,
            click.option("--peer", type=click.Choice(PEERS), help="Do the same work with it too, taking turns."),
            click.option("--kv-bits", type=click.Choice(["4", "8"]), help="Quantise keys and values."),
            click.option("--bits", type=click.Choice(["4", "8", "16"]), default="4", help="Bits of made-up weights."),
            click.option("--shapes", metavar="NAME", help=f"A geometry: {', '.join(SHAPES)}.  [default: {told}]"),
            click.option("--model", help="Folder or repo id of a checkpoint, instead of --shapes."),
        ):
            function = option(function)
        return function

    return decorate


@click.group(invoke_without_command=True, context_settings={"max_content_width": 110})
@click.pass_context
def group(context: click.Context) -> None:
    """Measure this machine: each question prints a table, and one JSON line on standard output.

    Without a question: a short suite of all of them, with mlx-lm beside, to be put into an issue.
    """
    if context.invoked_subcommand is None:
        _run_suite()


@group.command()
@subject_options(LARGE_SHAPES)
@click.option("--contexts", **NUMBERS, help="Tokens that a single row has seen.")
@click.option("--batch-sizes", **NUMBERS, help="Numbers of rows.")
@click.option("--verify", is_flag=True, help="Try our fused kernels out on this device instead: right? faster?")
@click.pass_context
def kernels(
    context: click.Context,
    /,
    contexts: tuple[int, ...] | None,
    batch_sizes: tuple[int, ...] | None,
    verify: bool,
    **named: Any,
) -> None:
    """Kernel launches a token, counted from the graph; runs nothing and needs no weights."""
    if verify:
        _refuse_others(context, "verify")
        _finish(ask_kernel_trials())
        return
    subject, measured = _split({"contexts": contexts, "batch_sizes": batch_sizes, **named}, LARGE_SHAPES)
    _finish(ask_launches(subject, **measured), subject)


@group.command()
@subject_options(LARGE_SHAPES)
@click.option("--batch-sizes", **NUMBERS, help="Numbers of rows.")
@click.option("--repeats", type=COUNT, help="Timed steps of each side and batch size.")
@click.option("--grown-to", type=COUNT, help="Context up to which traces are counted.")
def host(**options: Any) -> None:
    """Python time to build a decode step, and traces while a context grows; runs nothing and needs no weights."""
    subject, measured = _split(options, LARGE_SHAPES)
    _finish(ask_host_time(subject, **measured), subject)


@group.command()
@subject_options(None)
@click.option("--contexts", **NUMBERS, help="Tokens that each row has seen.")
@click.option("--batch-sizes", **NUMBERS, help="Numbers of rows.")
@click.option("--repeats", type=COUNT, help="Runs of each case.")
@click.option("--tokens", "num_tokens", type=COUNT, help="Tokens a row in each run.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw speed against context.")
def decode(plot: Path | None, **options: Any) -> None:
    """Tokens/s of decoding, bytes read a second, and share of the roofline."""
    subject, measured = _split(options)
    _finish(ask_decode_speed(subject, **measured), subject, plot_decode, plot)


@group.command()
@subject_options(None)
@click.option("--lengths", **NUMBERS, help="Tokens of a prompt.")
@click.option("--batch-sizes", **NUMBERS, help="Numbers of prompts taken at once.")
@click.option("--repeats", type=COUNT, help="Runs of each case.")
def prefill(**options: Any) -> None:
    """Tokens/s of taking prompts in."""
    subject, measured = _split(options)
    _finish(ask_prefill_speed(subject, **measured), subject)


@group.command()
@click.option("--model", required=True, type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder.")
@click.option("--jobs", type=COUNT, help="Worker processes.")
@click.option("--peer", type=click.Choice(PEERS), help="Convert with it too, and compare every tensor.")
def convert(model: Path, jobs: int | None, peer: str | None) -> None:
    """Seconds and memory of a conversion to 4 bits."""
    _finish(ask_conversion_cost(model, jobs=jobs, peer=peer))


@group.command()
@click.option("--shapes", required=True, metavar="NAME", help=f"A geometry: {', '.join(SHAPES)}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
@click.option("--shards", default=4, show_default=True, type=COUNT, help="Files of weights.")
@click.option("--tails", default="normal", show_default=True, type=click.Choice(TAILS), help="Distribution.")
@click.option("--seed", default=0, show_default=True, type=int, help="The same one gives the same bytes.")
def synthetic(shapes: str, out: Path, shards: int, tails: str, seed: int) -> None:
    """Write a checkpoint of random weights in Hugging Face's layout, for `convert`; it measures nothing."""
    from lfm_mlx.bench.synthetic import write_synthetic

    num_bytes = write_synthetic(shapes, out, num_shards=shards, tails=tails, seed=seed)
    click.echo(f"{out}: {format_bytes(num_bytes)}")


@group.command()
@subject_options(None)
@click.option("--context", type=COUNT, help="Tokens of the prompt.")
@click.option("--batch-size", type=COUNT, help="Rows.")
@click.option("--computed", type=COUNT, help="Tokens of it that are computed, the first ones being random.")
@click.option("--prefill-chunk", type=COUNT, help="Compute a chunk of so many tokens in one layer of each kind too.")
@click.option("--tokens", "num_tokens", type=COUNT, help="Generate so many tokens, and watch memory meanwhile.")
def memory(**options: Any) -> None:
    """Bytes of weights, caches, prefill and decode, beside what the planner expects."""
    subject, measured = _split(options)
    if subject.peer:
        raise OptionError("peer is mlx-lm, but memory measures this process alone; leave --peer out")
    _finish(ask_memory(subject, **measured), subject)


@group.command()
@click.option("--shapes", metavar="NAME", help=f"The geometry whose heads are taken.  [default: {LARGE_SHAPES}]")
@click.option("--columns", type=COUNT, help="Keys and values that the last token sees.")
@click.option("--tokens", "num_tokens", type=COUNT, help="Tokens that attend to them.")
@click.option("--kv-bits", type=click.Choice(["4", "8"]), default="8", show_default=True, help="Bits of them.")
def attention(kv_bits: str, **options: Any) -> None:
    """Bytes that attention over quantised keys and values takes beside them, and its error; one layer."""
    from lfm_mlx.bench.attention_memory import ask_attention_memory

    _finish(ask_attention_memory(kv_bits=int(kv_bits), **_given(**options)))


@group.command()
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a checkpoint whose tokenizer is taken, instead of a made-up vocabulary.",
)
@click.option(
    "--vocab-size",
    type=COUNT,
    help="Tokens of the made-up vocabulary.  [default: 128000]",
)
@click.option("--tools", "num_tools", **NUMBERS, help="Numbers of tools.")
@click.option("--starts", type=COUNT, help="Grammars started in each case.")
@click.option("--answers", type=COUNT, help="Answers drawn in each case.")
def constrain(model: Path | None, vocab_size: int | None, **options: Any) -> None:
    """Time of a mask and of a grammar's start, for tools, a JSON schema and a regex; needs no weights and no GPU."""
    from lfm_mlx.bench.mask_time import ask_mask_time

    if model is not None and vocab_size is not None:
        raise click.UsageError("give either --model or --vocab-size")
    _finish(ask_mask_time(model, **_given(vocab_size=vocab_size, **options)))


@group.command()
@click.option("--model", required=True, type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder.")
@click.option("--texts", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder of text files.")
@click.option("--files", type=COUNT, help="Most files that are read.")
@click.option("--tokens", type=COUNT, help="Most tokens of each.")
def loops(model: Path, texts: Path | None, files: int | None, tokens: int | None) -> None:
    """False alarms of the loop guard on ordinary texts, Python's standard library without --texts; runs no model."""
    _finish(ask_false_alarms(model, texts, **_given(num_texts=files, max_tokens=tokens)))


@group.command()
@click.option("--model", required=True, help="Folder or repo id of a checkpoint.")
@click.option("--peer", type=click.Choice(PEERS), help="Ask its server the same too, taking turns.")
@click.option("--clients", **NUMBERS, help="Numbers of clients that ask at once.")
@click.option("--rounds", type=COUNT, help="Questions of each client.")
@click.option("--prompt-tokens", type=COUNT, help="Tokens of a question.")
@click.option("--answer-tokens", type=COUNT, help="Tokens of an answer.")
@click.option("--prefix-tokens", type=COUNT, help="Tokens that conversations share.")
@click.option("--long-tokens", type=COUNT, help="Tokens of a prompt that comes while streams are read.")
@click.option("--option", "options", multiple=True, help="Word for this server's command line; may be repeated.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw speed and gaps against clients.")
@parallel_options
def serving(model: str, peer: str | None, plot: Path | None, **options: Any) -> None:
    """Servers from outside: first token, gaps between tokens, throughput, prefixes, a long prompt among streams."""
    from lfm_mlx.bench.served_side import serve_as_rank
    from lfm_mlx.bench.serving_speed import ask_serving

    subject, measured = _split(
        {**dict.fromkeys(("shapes", "kv_bits")), "bits": "4", "model": model, "peer": peer, **options}
    )
    if subject.num_ranks > 1 and launched_world(subject.num_ranks, subject.mode).rank > 0:
        serve_as_rank(subject, measured["options"])
    else:
        _finish(ask_serving(subject, **measured), None, plot_serving, plot)


@group.command()
@subject_options(LARGE_SHAPES)
@click.option("--plan", is_flag=True, help="On paper: bytes, collectives, memory and speed for 1 to 8 ranks.")
@click.option("--context", type=COUNT, help="Plan: tokens that a row has seen.")
@click.option("--batch-sizes", **NUMBERS, help="Plan: numbers of rows.")
@click.option("--chip", help="Plan: of every machine, as in M4 Pro.")
@click.option("--teraflops", type=click.FloatRange(0.01), help="Plan: of its matrix products.")
@click.option("--prompt-tokens", "prompt_len", type=COUNT, help="Tokens of a prompt that is measured.")
@click.option("--rows", "batch_size", type=COUNT, help="Prompts.")
@click.option("--steps", "num_steps", type=COUNT, help="Tokens decoded behind them.")
def distributed(plan: bool, **options: Any) -> None:
    """What several machines would bring, on paper; or what ranks that were launched send and hold."""
    paper = {name: options.pop(name) for name in ("context", "batch_sizes", "chip", "teraflops")}
    subject, measured = _split(options, LARGE_SHAPES)
    if subject.peer:
        raise OptionError("peer is mlx-lm, but ranks are compared with the plan alone; leave --peer out")
    if plan == (subject.num_ranks > 1):
        raise click.UsageError("give one of --plan, --tensor-parallel N and --expert-parallel N")
    wrong = measured if plan else _given(**paper)
    if wrong:
        found = [one.opts[0] for one in click.get_current_context().command.params if one.name in wrong]
        raise click.UsageError(f"{', '.join(found)} belong to {'a measurement' if plan else '--plan'}; leave them out")
    if plan:
        _finish(ask_distributed_plan(subject, **_given(**paper)))
    else:
        _finish(ask_distributed_run(subject, **measured), subject)


command = group
"""What ``lfm-mlx bench`` calls."""


_NAMING = ("model", "shapes", "bits", "kv_bits", "peer", "tensor_parallel", "expert_parallel")


def _split(options: dict[str, Any], default: str | None = None) -> tuple[Subject, dict[str, Any]]:
    """What is asked about, and what is asked."""
    named = {name: options.pop(name) for name in _NAMING}
    subject = _subject(default, asked=_given(**options), **named)
    if subject.num_ranks == 1:
        check_alone("--tensor-parallel", "--expert-parallel")
    return subject, _given(**options)


def _subject(
    default: str | None,
    asked: dict[str, Any],
    model: str | None,
    shapes: str | None,
    bits: str,
    kv_bits: str | None,
    peer: str | None,
    tensor_parallel: int | None,
    expert_parallel: int | None,
) -> Subject:
    if model is not None and shapes is not None:
        raise click.UsageError("give either --model or --shapes")
    if (tensor_parallel or 1) > 1 and (expert_parallel or 1) > 1:
        raise click.UsageError("give either --tensor-parallel or --expert-parallel")
    return Subject(
        shapes=shapes or default or default_shapes(),
        model=model,
        bits=int(bits),
        kv_bits=int(kv_bits) if kv_bits else None,
        peer=peer is not None,
        num_ranks=max(tensor_parallel or 1, expert_parallel or 1),
        mode="expert" if (expert_parallel or 1) > 1 else "tensor",
        asked=asked,
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse_others(context: click.Context, name: str) -> None:
    """Refuse options that the option `name` leaves without a meaning."""
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name != name
        and context.get_parameter_source(str(parameter.name)) not in (ParameterSource.DEFAULT, None)
    ]
    if given:
        raise click.UsageError(f"--{name} takes no other options, found {', '.join(given)}; leave out one or the other")


def _finish(
    report: Report,
    subject: Subject | None = None,
    plot: Callable[[Report, Path], None] | None = None,
    file: Path | None = None,
) -> None:
    if subject is not None and subject.is_answered_elsewhere():
        return
    if plot is not None and file is not None:
        plot(report, file)
    report.show()
    report.print_json()


def _run_suite() -> None:
    from lfm_mlx.bench.mask_time import ask_mask_time

    large, here = Subject(peer=True), Subject(shapes=default_shapes(), peer=has_room_for_peer())
    reports = []
    for ask in (
        partial(ask_launches, large),
        partial(ask_host_time, large),
        ask_mask_time,
        partial(ask_memory, here),
        partial(ask_prefill_speed, here),
        partial(ask_decode_speed, here),
    ):
        report = ask()
        report.show()
        reports.append(report.as_json())
    shared = {name: reports[0][name] for name in ("backend", "machine", "versions", "commit")}
    answers = [{name: report[name] for name in ("question", "parameters", "results")} for report in reports]
    click.echo("\nTo report these numbers, paste the tables above or the line below into an issue.", err=True)
    click.echo(json.dumps({"question": "suite", **shared, "answers": answers}))


if __name__ == "__main__":
    run(group, "python -m lfm_mlx.bench")
