"""The end of every question: a table for people, then one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from lfm_mlx.bench.machine import backend, commit, machine, versions


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one question found.

    Args:
        question: its name on the command line.
        parameters: what was asked.
        results: what was found, ready for JSON.
        title: one line above the table.
        header: names of the table's columns.
        rows: its lines.
        notes: what to know when reading it.
    """

    question: str
    parameters: Mapping[str, Any]
    results: Mapping[str, Any]
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    notes: Sequence[str] = ()

    def show(self) -> None:
        """Print the table to standard error, so that standard output stays one JSON line a question."""
        click.echo(f"\n{self.title} [{backend()}]", err=True)
        click.echo(format_table(self.header, self.rows), err=True)
        for note in self.notes:
            click.echo(f"  {note}", err=True)

    def as_json(self) -> dict[str, Any]:
        """The report without its table."""
        return {
            "question": self.question,
            "backend": backend(),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "parameters": dict(self.parameters),
            "results": dict(self.results),
        }

    def print_json(self) -> None:
        """Print one JSON line to standard output."""
        click.echo(json.dumps(self.as_json()))


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns side by side, numbers to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = []
    for line in cells:
        padded = [line[0].ljust(widths[0]), *(line[i].rjust(widths[i]) for i in range(1, len(line)))]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
