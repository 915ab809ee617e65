"""`sgfx train`: train a dense model."""

from __future__ import annotations

from collections.abc import Sequence

from sgfx.commands.options import TrainOptions
from sgfx.commands.parsing import parse

HELP = "train a dense model"


def main(arguments: Sequence[str]) -> int:
    """Read the options and run; return the exit status."""
    options = parse(TrainOptions, arguments, prog="sgfx train", description=HELP)
    train(options)
    return 0


def train(options: TrainOptions) -> None:
    """Train, and leave the weights, the report and the plots in the folder of the run.

    Raises:
        InputError: (or ValueError) an option, the data or the folder can't be taken.
    """
    from passes.errors import InputError
    from sgfx.commands.kinds import KINDS
    from sgfx.commands.results import plot, sizes, write_report
    from sgfx.commands.run import adjusted, open_folder, open_model
    from sgfx.training.recipes import recipe

    kind = KINDS[options.task]
    found = recipe(options.recipe or kind.baseline)
    if found.compresses:
        raise InputError(f"recipe {found.name!r} compresses: it is for sgfx compress")
    loaders = kind.open(options, found.batch_size)
    model, inputs = open_model(options, loaders)
    run = adjusted(options, found.name, loaders)
    folder, options = open_folder(options)
    outcome = run.run(
        model, loaders.train, loaders.val, folder=folder, resume=True, seed=options.seed, progress=options.progress
    )
    loaders.report_unreadable()
    rows = {"trained": kind.results(model, loaders, progress=options.progress) | sizes(model, inputs)}
    write_report(folder, rows, inputs)
    plot(folder, [("training", None, [record.row() for record in outcome.history.epochs])], kind.best)
