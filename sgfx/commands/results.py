"""What a run comes to: accuracies, sizes and pictures, in ``report.txt``, ``report.json`` and PNG files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import sgfx
from sgfx.commands.run import is_main, say
from sgfx.files.writing import replacing
from sgfx.reporting.counting import count_macs
from sgfx.training.tasks.classification import TopMeter

Row = Mapping[str, Any]


def accuracies(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, progress: bool) -> dict[str, float]:
    """Top-1, and top-5 where there are more than five classes, of a model in eval mode: shares in [0, 1]."""
    device = next(model.parameters()).device
    meter, mode = TopMeter(), model.training
    model.eval()
    with torch.inference_mode(), tqdm(batches, desc="evaluate", leave=False, disable=None if progress else True) as bar:
        for inputs, targets in bar:
            meter.update(model(inputs.to(device)).float(), targets.to(device))
    model.train(mode)
    return meter.results([meter.state()])


def sizes(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Parameters and MACs per image."""
    return {"params": sum(p.numel() for p in model.parameters()), "macs": count_macs(model, (example[:1],))[""]}


def write_report(
    folder: Path,
    rows: Mapping[str, Row],
    example: Tensor,
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
        layers = sgfx.report(dense, small, example[:1])
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


def plot(folder: Path, phases: Sequence[tuple[str, float | None, Sequence[Row]]]) -> None:
    """Draw accuracy over epochs and, where it was pruned in steps, over what was pruned.

    Args:
        folder: of the run.
        phases: for each training its name, the share that was pruned then, and the rows of its epochs.
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
        axes.set(xlabel=xlabel, ylabel="top-1")
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
    for part, label in (("train_top1", "training images"), ("val_top1", "validation images")):
        points = [(epoch, row[part]) for epoch, row in enumerate(rows, 1) if row.get(part) is not None]
        if points:
            lines[label] = ([float(x) for x, _ in points], [y for _, y in points])
    if lines:
        picture("accuracy_epochs.png", "epoch", lines, ends)
    steps = [(pruned, each[-1]["val_top1"]) for _, pruned, each in phases if pruned is not None and each]
    if steps:
        x, y = [pruned for pruned, _ in steps], [top1 for _, top1 in steps]
        picture("accuracy_steps.png", "connections pruned", {"validation images, after each step": (x, y)}, None)
