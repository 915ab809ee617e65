"""The results of the coverage sweep as lines and as a table in Markdown."""

from __future__ import annotations

from typing import Any

HEAD = """# Coverage

Written by `python -m benchmarks.coverage --write docs/coverage.md` (and `--timm`): random weights, groups=8,
ratio=0.5. Each network is compiled with and without elimination and compared with the dense network whose pruned
weights are zero: outputs in eval and in train mode (dropout and stochastic depth off), gradients and running statistics
in train mode. Differences are relative; up to 1e-8 in double precision (1e-4 where a network only runs in single) they
count as exact.
"""
COLUMNS = ("network", "parameters", "layers regrouped", "pruned there", "parameters left", "with elimination", "result")


def summary(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    if "worst" not in record:
        reason = str(record.get("reason", "")).splitlines()
        return f"{record['name']:32} {record['status']}: {reason[0][:200] if reason else ''}"
    cells = _cells(record)
    return (
        f"{record['name']:32} {cells[-1]}; {cells[1]}, {cells[2]} layers regrouped, {cells[3]} pruned, "
        f"{cells[4]} left, {cells[5]} with elimination; {record.get('seconds', 0):.0f} s"
    )


def table(records: list[dict[str, Any]]) -> str:
    """The page for the docs."""
    pages = [HEAD]
    for family in dict.fromkeys(record["family"] for record in records):
        mine = [record for record in records if record["family"] == family]
        good = sum(record["status"] in ("exact", "refused as it must be") for record in mine)
        pages.append(f"\n## {family.capitalize()}: {good} of {len(mine)}\n")
        pages.append("| " + " | ".join(COLUMNS) + " |")
        pages.append("|---|" + "---:|" * (len(COLUMNS) - 2) + "---|")
        pages.extend("| " + " | ".join(_cells(record)) + " |" for record in mine)
    return "\n".join(pages) + "\n"


def _cells(record: dict[str, Any]) -> list[str]:
    if "worst" not in record:
        reason = str(record.get("reason", "")).splitlines() or [""]
        return [record["name"], *[""] * (len(COLUMNS) - 2), f"{record['status']}: {reason[0][:160]}"]
    return [
        record["name"],
        f"{record['parameters'] / 1e6:.1f} M",
        f"{record['regrouped']} of {record['layers']}",
        f"{100 * record['achieved']:.2f} %",
        f"{100 * record['parameters_small'] / record['parameters']:.1f} %",
        f"{100 * record.get('parameters_eliminated', 0) / record['parameters']:.1f} %",
        f"{record['status']}, {record['worst']:.0e}" + (" (single)" if record["dtype"] == "float32" else ""),
    ]
