"""`sgfx evaluate`: the accuracy and the size of what a run has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sgfx.commands.options import Common, EvaluateOptions
from sgfx.commands.parsing import build, parse, read_config

HELP = "the accuracy and size of what a run has made"


def main(arguments: Sequence[str]) -> int:
    """Read the options and run; return the exit status."""
    evaluate(parse(EvaluateOptions, arguments, prog="sgfx evaluate", description=HELP))
    return 0


def evaluate(options: EvaluateOptions) -> None:
    """Print what is measured on the validation images, parameters and MACs.

    Raises:
        InputError: (or ValueError) the folder holds no finished run, or the data don't fit.
    """
    import json

    from passes.errors import InputError
    from sgfx.commands.kinds import KINDS
    from sgfx.commands.models import own_device
    from sgfx.commands.results import results_table, sizes
    from sgfx.commands.run import CONFIG, FINAL, load_weights, open_model, say

    folder = Path(options.run)
    for name in (CONFIG, FINAL):
        if not (folder / name).is_file():
            state = "is no run" if name == CONFIG else "holds a run that is not finished: give its command again"
            raise InputError(f"{folder} {state} (there is no {name})")
    values = read_config(folder / CONFIG)
    run = replace(build(Common, values | {"out": str(folder)}), checkpoint=None, workers=options.workers)
    if options.data is not None:
        run = replace(run, data=options.data, download=None)
    kind = KINDS[run.task]
    loaders = kind.open(run, options.batch_size or 64)
    model, inputs = open_model(run, loaders)
    load_weights(model, folder / FINAL)
    row = kind.results(model.to(own_device()), loaders, progress=not options.json) | sizes(model, inputs)
    say(json.dumps(row, indent=2) if options.json else results_table({str(folder): row}))
