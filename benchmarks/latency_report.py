"""Tables, the list of what must be reached, a bar chart and the page, from the results of `benchmarks.latency`.

``python -m benchmarks.latency_report [--json benchmarks/results/latency.json] [--page docs/performance.md]
[--chart docs/latency.png]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.latency_forms import NETWORKS

DENSE = ("dense eager", "dense channels_last", "dense compiled", "dense ONNX Runtime")
# Numerator, case, denominator ("best dense" is the fastest of `DENSE`), at most.
REQUIRED = (
    ("resnet50/1", "dense compiled", 0.40),
    ("resnet50/1", "dense ONNX Runtime", 0.45),
    ("resnet50/1", "pruned compiled", 1.15),
    ("resnet50/1", "block by block", 0.15),
    ("resnet50_all/1", "dense compiled", 0.33),
    ("resnet50/16", "best dense", 0.45),
    ("densenet201/1", "best dense", 0.50),
)
FREEZING = {"first": (40, "first time"), "cached": (12, "code cached"), "decided": (4, "code cached, decisions given")}
MEMORY = 0.80
Quartiles = tuple[float, float, float]


def main() -> None:
    """Write the page and the chart."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latency.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--chart", type=Path, default=Path("docs/latency.png"))
    options = parser.parse_args()
    results = json.loads(options.json.read_text())
    write_chart(results, options.chart)
    options.page.write_text(page(results, options.chart.name))


def quartiles(values: list[float]) -> Quartiles:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(case: dict[str, Any], form: str, other: str) -> Quartiles | None:
    """Quartiles of the ratios of two forms' times within the rounds; None if one of them is missing."""
    times = case.get("milliseconds", {})
    if other == "best dense":
        there = [each for each in DENSE if each in times]
        other = min(there, key=lambda each: statistics.median(times[each])) if there else ""
    if form not in times or other not in times:
        return None
    return quartiles([mine / theirs for mine, theirs in zip(times[form], times[other], strict=True)])


def case_table(case: dict[str, Any], style: str = "simple") -> str:
    """One line per form: milliseconds, the frozen form's ratio to it, its share of the machine's matrix product."""
    rows = []
    for form, times in case["milliseconds"].items():
        low, middle, high = quartiles(times)
        of = ratios(case, "frozen", form)
        macs = case["macs"][form]
        rates = [macs / ms / 1e6 for ms in times]
        share = statistics.median(rate / peak for rate, peak in zip(rates, case["sgemm_gmacs"], strict=True))
        times_and_ratio = [f"{middle:.2f}", f"{low:.2f} – {high:.2f}", spread(of)]
        rows.append([form, f"{macs / 1e9:.2f}", *times_and_ratio, f"{statistics.median(rates):.1f}", f"{share:.2f}"])
    rows += [[form, "", "failed", why] for form, why in case["failed"].items()]
    head = ["form", "GMACs", "ms", "quartiles", "frozen / it", "GMAC/s", "of sgemm"]
    return str(tabulate(rows, head, tablefmt=style, disable_numparse=True))


def spread(of: Quartiles | None) -> str:
    """A median with its quartiles."""
    return "" if of is None else f"{of[1]:.2f} ({of[0]:.2f} – {of[2]:.2f})"


def print_case(case: dict[str, Any]) -> None:
    """Print the table of a case and its roofline."""
    if "error" in case:
        print(f"  {case['error']}")
    else:
        print(f"{case_table(case)}\n{roofline(case)}")


def roofline(case: dict[str, Any]) -> str:
    """What the machine's matrix product makes of the same work."""
    low, peak, high = quartiles(case["sgemm_gmacs"])
    text = f"sgemm of the machine: {peak:.1f} GMAC/s ({low:.1f} – {high:.1f}), {len(case['sgemm_gmacs'])} rounds"
    macs = case["macs"].get("frozen")
    return text if macs is None else f"{text}; the frozen model's MACs at that rate: {macs / peak / 1e6:.2f} ms"


def required(results: dict[str, Any]) -> list[list[str]]:
    """What must be reached, what was measured, and whether it is reached."""
    rows = []

    def add(what: str, of: Quartiles | None, most: float, show: Callable[[Quartiles | None], str] = spread) -> None:
        verdict = "not measured" if of is None else "reached" if of[1] <= most else "not reached"
        rows.append([what, f"{most:g}", show(of), verdict])

    cases = results["cases"]
    for key, other, most in REQUIRED:
        add(f"{title(key)}: frozen / {other}", ratios(cases.get(key, {}), "frozen", other), most)
    for key, case in cases.items():
        add(f"{title(key)}: frozen / dense frozen", ratios(case, "frozen", "dense frozen"), 1.0)
    for kind, (most, words) in FREEZING.items():
        taken = results.get("freezing", {}).get("seconds", {}).get(kind)
        of = quartiles(taken * 2) if taken else None
        add(f"freezing ResNet-50, seconds, {words}", of, most, lambda of: "" if of is None else f"{of[1]:.1f}")
    peaks = results.get("memory", {}).get("bytes", {})
    dense, frozen = (peaks.get(form) or [] for form in ("dense", "frozen"))
    of = quartiles([a / b for a, b in zip(frozen, dense, strict=False)] * 2) if frozen and dense else None
    add("peak memory of ten calls, ResNet-50: frozen / dense eager", of, MEMORY)
    return rows


def title(key: str) -> str:
    """A case in words."""
    name, _, batch = key.partition("/")
    return f"{NETWORKS[name].title}, batch {batch}"


def print_required(results: dict[str, Any]) -> None:
    """Print what must be reached, and whether it is."""
    print(tabulate(required(results), ["ratio", "at most", "measured", ""], disable_numparse=True))


def page(results: dict[str, Any], chart: str) -> str:
    """The page of results, in Markdown."""
    head = ["ratio", "at most", "median (quartiles)", ""]
    parts = [
        "# Performance",
        "Written by `python -m benchmarks.latency_report` from what `python -m benchmarks.latency` measured on "
        f"{results['date']}.",
        f"Machine: {results['machine']}. Every network and batch size has a process of its own; all forms are called "
        "in turn, round by round, each after a pause, and the second of two calls counts. A ratio is the median of the "
        "ratios within the rounds, in brackets are its quartiles. *Best dense* is the fastest of eager, channels_last, "
        "compiled (inductor, weights frozen) and ONNX Runtime.",
        "Networks are compiled with 16 groups, convolutions at 0.8, linear layers at 0.6. ResNet-50 keeps its "
        "downsample convolutions dense, as in the paper; *all but the stem* regroups them too. Weights are random, for "
        "want of trained ones; the groups found in them are uneven (see each table).",
        f"![Milliseconds of every form]({chart})",
        "## What must be reached",
        tabulate(required(results), head, tablefmt="github", disable_numparse=True),
    ]
    for key, case in results["cases"].items():
        parts.append(f"## {title(key)}")
        if "error" in case:
            parts.append(f"Failed: {case['error']}")
            continue
        sizes = case["filters_per_group"]
        parts += [
            case_table(case, "github"),
            f"{roofline(case)[0].upper()}{roofline(case)[1:]}. Filters per group: median {sizes['median']:.0f}, "
            f"quartiles {sizes['quartile']:.0f} and {sizes['third_quartile']:.0f}, at most {sizes['most']:.0f}.",
        ]
    return "\n\n".join(parts) + "\n"


def write_chart(results: dict[str, Any], file: Path) -> None:
    """Draw the median time of every form, relative to the dense eager one, a panel per case."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = {key: case for key, case in results["cases"].items() if case.get("milliseconds")}
    columns = 2 if len(cases) > 1 else 1
    rows = max(1, -(-len(cases) // columns))
    figure, panels = plt.subplots(rows, columns, figsize=(6 * columns, 2.6 * rows), squeeze=False, layout="constrained")
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, (key, case) in zip(panels.flat, cases.items(), strict=False):
        spreads = {form: quartiles(times) for form, times in case["milliseconds"].items()}
        middle = [each[1] for each in spreads.values()]
        bars = [[each[1] - each[0] for each in spreads.values()], [each[2] - each[1] for each in spreads.values()]]
        colors = ["tab:orange" if form == "frozen" else "tab:blue" for form in spreads]
        panel.barh(list(spreads), middle, xerr=bars, color=colors)
        panel.invert_yaxis()
        end = 1.15 * max(ms for form, ms in zip(spreads, middle, strict=True) if form != "block by block")
        panel.set_xlim(0, end)
        for row, ms in enumerate(middle):
            if ms > end:  # the bar ends at the edge, its number does not
                panel.text(0.98 * end, row, f"{ms:.0f} ms", ha="right", va="center", color="white")
        panel.set_title(title(key))
        panel.set_xlabel("ms per call")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
