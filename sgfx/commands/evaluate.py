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
    """Print top-1 and top-5 on the validation images, parameters and MACs.

    Raises:
        InputError: (or ValueError) the folder holds no finished run, or the data don't fit.
    """
    import json

    from passes.errors import InputError
    from sgfx.commands.results import accuracies, results_table, sizes
    from sgfx.commands.run import CONFIG, FINAL, load_weights, open_loaders, open_model, open_source, say

    folder = Path(options.run)
    for name in (CONFIG, FINAL):
        if not (folder / name).is_file():
            state = "is no run" if name == CONFIG else "holds a run that is not finished: give its command again"
            raise InputError(f"{folder} {state} (there is no {name})")
    values = read_config(folder / CONFIG)
    run = replace(build(Common, values | {"out": str(folder)}), checkpoint=None, workers=options.workers)
    if options.data is not None:
        run = replace(run, data=options.data, download=None)
    source = open_source(run)
    loaders = open_loaders(run, source, options.batch_size or 64)
    model, example = open_model(run, loaders, source)
    load_weights(model, folder / FINAL)
    row = accuracies(model.to(example.device), loaders.val, progress=not options.json) | sizes(model, example)
    say(json.dumps(row, indent=2) if options.json else results_table({str(folder): row}))
