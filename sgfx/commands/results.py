"""What a run comes to: accuracies, sizes and pictures, in ``report.txt``, ``report.json`` and PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import nn

import sgfx
from sgfx.commands.kinds import Arguments
from sgfx.commands.run import is_main, say
from sgfx.files.writing import replacing
from sgfx.reporting.counting import count_macs

Row = Mapping[str, Any]
NAMES = {"top1": "top-1", "map": "mAP"}


def sizes(model: nn.Module, inputs: Arguments) -> dict[str, int]:
    """Parameters, and MACs for one image."""
    return {"params": sum(p.numel() for p in model.parameters()), "macs": count_macs(model, inputs)[""]}


def write_report(
    folder: Path,
    rows: Mapping[str, Row],
    inputs: Arguments,
    *,
    dense: nn.Module | None = None,
    small: nn.Module | None = None,
) -> None:
    """Write and print what the networks of `rows` come to; the layers too, of a compressed one."""
    if not is_main():
        return
    table = results_table(rows)
    content: dict[str, Any] = {"results": dict(rows)}
    text = table
    if dense is not None and small is not None:
        layers = sgfx.report(dense, small, inputs)
        text += f"\n\n{layers}"
        content["report"] = layers.to_dict()
    for name, written in (("report.txt", f"{text}\n"), ("report.json", json.dumps(content, indent=2))):
        with replacing(folder / name) as temporary:
            temporary.write_text(written, encoding="utf-8")
    say(table)


def results_table(rows: Mapping[str, Row]) -> str:
    """The rows for the terminal: shares as percent, counts in full."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    body = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    text: str = tabulate(body, ["", *columns], colalign=["left"] + ["right"] * len(columns), disable_numparse=True)
    return text


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f}%"


def plot(folder: Path, phases: Sequence[tuple[str, float | None, Sequence[Row]]], best: str) -> None:
    """Draw what is measured over epochs and, where it was pruned in steps, over what was pruned.

    Args:
        folder: of the run.
        phases: for each training its name, the share that was pruned then, and the rows of its epochs.
        best: what is measured, by its name in the rows.
    """
    if not is_main():
        return
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter
    except ImportError:
        say("no plots: matplotlib is not installed (pip install 'sgfx[plots]')")
        return

    def picture(
        name: str, xlabel: str, lines: Mapping[str, tuple[list[float], list[float]]], marks: list[int] | None
    ) -> None:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in lines.items():
            axes.plot(x, y, "o-", markersize=4, label=label)
        for each in marks or ():
            axes.axvline(each + 0.5, color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel=xlabel, ylabel=NAMES[best])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        if marks is None:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(folder / name) as temporary:
            figure.savefig(temporary, dpi=150, format="png")

    rows = [row for _, _, each in phases for row in each]
    ends = [sum(len(each) for _, _, each in phases[: i + 1]) for i in range(len(phases) - 1)]
    lines = {}
    for part, label in ((f"train_{best}", "training images"), (f"val_{best}", "validation images")):
        points = [(epoch, row[part]) for epoch, row in enumerate(rows, 1) if row.get(part) is not None]
        if points:
            lines[label] = ([float(x) for x, _ in points], [y for _, y in points])
    if lines:
        picture("accuracy_epochs.png", "epoch", lines, ends)
    steps = [(pruned, each[-1][f"val_{best}"]) for _, pruned, each in phases if pruned is not None and each]
    if steps:
        x, y = [pruned for pruned, _ in steps], [top1 for _, top1 in steps]
        picture("accuracy_steps.png", "connections pruned", {"validation images, after each step": (x, y)}, None)
