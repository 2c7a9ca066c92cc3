"""Decode speed against context, with the roofline, and speed of servers against clients, as pictures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lfm_mlx.bench.report import Report
from lfm_mlx.errors import OptionError

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def plot_decode(report: Report, path: Path) -> None:
    """Draw a report of the question "decode" into `path`; the file's ending chooses the format.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    figure, axes = _figure()
    cases: list[dict[str, Any]] = report.results["cases"]
    batch_sizes = sorted({case["batch_size"] for case in cases})
    for color, batch_size in zip(COLORS * len(batch_sizes), batch_sizes, strict=False):
        drawn = [case for case in cases if case["batch_size"] == batch_size]
        contexts = [case["context"] for case in drawn]
        rows = f"{batch_size} row" + "s" * (batch_size > 1)
        for name, style in zip(drawn[0]["tokens_per_s"], ("o-", "x--"), strict=False):
            speeds = [case["tokens_per_s"][name] for case in drawn]
            axes.plot(contexts, speeds, style, color=color, label=f"{name}, {rows}")
        limits = [case["roofline_tokens_per_s"] for case in drawn]
        axes.plot(contexts, limits, ":", color=color, label=f"roofline, {rows}")
    machine = report.as_json()["machine"]
    axes.set_xlabel("context in tokens")
    axes.set_ylabel("tokens/s of all rows")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{report.title.partition(', ')[2]}\n{machine['chip']}, {machine['backend']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_serving(report: Report, path: Path) -> None:
    """Draw a report of the question "serving" into `path`: speed, and gaps in streams, against clients.

    Raises:
        OptionError: matplotlib is not installed, or the file cannot be written.
    """
    figure, (speeds, gaps) = _figure(2)
    cases: list[dict[str, Any]] = report.results["load"]
    numbers = [case["clients"] for case in cases]
    for color, name in zip(COLORS, [name for name in cases[0] if name != "clients"], strict=False):
        speeds.plot(numbers, [case[name]["tokens_per_s"] for case in cases], "o-", color=color, label=name)
        for share, style in (("p50", "o-"), ("p95", "x--")):
            drawn = [case[name]["gap_ms"].get(share) for case in cases]
            gaps.plot(numbers, drawn, style, color=color, label=f"{name}, {share}")
    speeds.set_ylabel("tokens/s of all clients")
    gaps.set_ylabel("ms between pieces of a stream")
    for axes in (speeds, gaps):
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_xlabel("clients at once")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    machine = report.as_json()["machine"]
    figure.suptitle(f"{report.title}\n{machine['chip']}, {machine['backend']}", fontsize=10)
    figure.set_size_inches(10, 4)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise OptionError(f"plot: {path} cannot be written ({error}); name a .png, .pdf or .svg file") from error


def _figure(num_panels: int = 1) -> tuple[Any, Any]:
    try:
        # An optional extra, and slow to import. Figures made this way need no display.
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise OptionError("plot needs matplotlib, which is not installed; pip install 'lfm-mlx[bench]'") from error
    figure = module.Figure(figsize=(7, 4.5))
    return figure, figure.subplots(1, num_panels)
