"""`sgfx tables`: the sizes of the paper's Tables 1 to 6 beside the compiler's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

HELP = "the paper's Tables 1 to 6: published sizes beside the compiler's"


def main(arguments: Sequence[str]) -> int:
    """Compile the networks of the tables and print; return the exit status."""
    parser = argparse.ArgumentParser(prog="sgfx tables", description=HELP)
    parser.add_argument("--json", action="store_true", help="print plain data instead of tables")
    _tables(as_json=parser.parse_args(arguments).json)
    return 0


def _tables(*, as_json: bool) -> None:
    from tqdm import tqdm

    from sgfx.published import TABLES
    from sgfx.tables import format_table, rows

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
