"""The command line. What a command does is in `sgfx.commands`, and is imported when it is called."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import sgfx

COMMANDS = {
    "train": "train a dense model",
    "compress": "regroup a trained model, and train it on",
    "evaluate": "the accuracy and size of what a run has made",
    "tables": "the paper's Tables 1 to 6: published sizes beside the compiler's",
}

RESUMED = "; the same command goes on from what is in the folder of the run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `sgfx` command; return its exit status: 2 if something was wrong with what was given."""
    parser = _Parser(prog="sgfx", description=(sgfx.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"sgfx {sgfx.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows a command is its own: argparse would take its flags for ours.
    command = parser.parse_args(given[:1]).command
    return _run(command, given[1:])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _run(command: str, arguments: Sequence[str]) -> int:
    """Run a command; what was given wrongly is said in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _warn
            return int(import_module(f"sgfx.commands.{command}").main(arguments))
    except KeyboardInterrupt:
        print(f"interrupted{RESUMED}" if command in ("train", "compress") else "interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sgfx {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
