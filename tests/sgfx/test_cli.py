"""The command line."""

import json
import subprocess
import sys

import pytest

from sgfx import __version__, cli, published
from sgfx.commands import tables as tables_command


@pytest.fixture
def one_small_table(monkeypatch):
    """One table of a network that compiles in no time, in place of the paper's."""
    lines = (("Baseline", 0, 0, 61706, 416520), ("LeNet-5 (Conv50/FC50)", 0.5, 0.5, 31000, 210000))
    table = published.Table(9, "LeNet-5", "lenet5", 32, 4, lines, options={"in_channels": 3})
    monkeypatch.setattr(published, "TABLES", (table,))


def test_tables_prints_a_table(one_small_table, capsys):
    assert cli.main(["tables"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Table 9. LeNet-5")
    assert "LeNet-5 (Conv50/FC50)" in out


def test_tables_prints_json(one_small_table, capsys):
    assert cli.main(["tables", "--json"]) == 0
    baseline, half = json.loads(capsys.readouterr().out)
    assert baseline["macs"] > half["macs"] > 0
    assert half["params_difference"] == pytest.approx(half["params"] / 31000 - 1)


def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(*, as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables_command, "_tables", interrupted)
    assert cli.main(["tables"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_missing_command_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "COMMAND" in capsys.readouterr().err


def test_help_and_version_do_not_import_torch():
    program = (
        "import sys, sgfx.cli\n"
        "for flag in ('--help', '--version'):\n"
        "    try: sgfx.cli.main([flag])\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
    assert "tables" in done.stdout
