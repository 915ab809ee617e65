"""The command line. What it does is done by the library; torch is imported only by the commands that need it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import sgfx


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `sgfx` command; return its exit status."""
    parser = argparse.ArgumentParser(prog="sgfx", description=(sgfx.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"sgfx {sgfx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tables = commands.add_parser("tables", help="the paper's Tables 1 to 4: published sizes beside the compiler's")
    tables.add_argument("--json", action="store_true", help="print plain data instead of tables")
    options = parser.parse_args(arguments)
    try:
        return _tables(as_json=options.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _tables(*, as_json: bool) -> int:
    from tqdm import tqdm

    from sgfx.tables import TABLES, format_table, rows

    total = sum(len(table.rows) for table in TABLES)
    data = []
    with tqdm(total=total, desc="compiling", unit="row", disable=None, leave=False) as bar:
        for table in TABLES:
            lines = []
            for row in rows(table):
                lines.append(row)
                bar.update()
            data += [row.to_dict() for row in lines]
            if not as_json:
                tqdm.write(format_table(table, lines) + "\n")
    if as_json:
        print(json.dumps(data, indent=2))
    return 0
