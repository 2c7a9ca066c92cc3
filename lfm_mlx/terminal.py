"""What every command does alike: one line an error, exit codes, progress on standard error.

Exit codes: 0 done, 1 refused or failed with a message, 2 wrong usage, 130 interrupted. Of processes that were launched
together, rank 0 speaks to the user: another one says only what rank 0 does not say too.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from typing import Any, NoReturn

import click

from lfm_mlx.errors import LfmError

INTERRUPTED = 130

QUIET_S = 3.0
"""A problem that all ranks have, rank 0 tells within this time, and `mlx.launch` then ends the others."""


def run(command: click.Command, name: str) -> NoReturn:
    """Run a click command as a program; every error is one message on standard error, never a traceback."""
    rank = os.environ.get("MLX_RANK", "0")
    with contextlib.ExitStack() as stack:
        if rank != "0":
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        sys.exit(_code_of(command, name, rank))


def _code_of(command: click.Command, name: str, rank: str) -> int:
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # A terminal that cannot show a character shows "?" instead.
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except (LfmError, MemoryError, click.ClickException) as error:
        if rank == "0":
            return _show(error)
        time.sleep(QUIET_S)
        click.echo(f"error: rank {rank}: {_message(error)}", err=True)
        return error.exit_code if isinstance(error, click.ClickException) else 1
    except (KeyboardInterrupt, click.Abort):
        if rank == "0":
            click.echo("interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def _show(error: Exception) -> int:
    """Tell the user what is wrong; returns the exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    click.echo(f"error: {_message(error)}", err=True)
    return 1


def _message(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller model, a lower precision or a shorter context"
    return str(error)


class FiniteRange(click.FloatRange):
    """A number within bounds, which neither "nan" nor "inf" is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000: "4.9 GB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
