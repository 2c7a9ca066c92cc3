"""What every command does alike: one line an error, exit codes, progress on standard error.

Exit codes: 0 done, 1 refused or failed with a message, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from lfm_mlx.errors import LfmError

INTERRUPTED = 130


def run(command: click.Command, name: str) -> NoReturn:
    """Run a click command as a program; every error is one message on standard error, never a traceback."""
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="replace")  # A terminal that cannot show a character shows "?" instead.
    try:
        code = command.main(prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except LfmError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        click.echo("error: out of memory; use a smaller model, a lower precision or a shorter context", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def format_bytes(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000: "4.9 GB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
