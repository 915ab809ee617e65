"""`sgfx compress`: regroup a trained model and train it on, by a recipe or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgfx.commands.options import CompressOptions
from sgfx.commands.parsing import parse

if TYPE_CHECKING:
    from torch import nn

    from sgfx.commands.kinds import AnyLoaders, Arguments

HELP = "regroup a trained model, and train it on"
Phases = list[tuple[str, float | None, list[dict[str, float]]]]


def main(arguments: Sequence[str]) -> int:
    """Read the options and run; return the exit status."""
    options = parse(CompressOptions, arguments, prog="sgfx compress", description=HELP)
    compress(options)
    return 0


def compress(options: CompressOptions) -> None:
    """Compress, and leave the model, the report and the plots in the folder of the run.

    Raises:
        InputError: (or ValueError) an option, the data or the folder can't be taken.
    """
    from passes.errors import InputError
    from passes.layers import plans
    from sgfx.commands.kinds import KINDS
    from sgfx.commands.results import plot, sizes, write_report
    from sgfx.commands.run import open_folder, open_model
    from sgfx.training.recipes import recipe

    _check(options)
    kind = KINDS[options.task]
    loaders = kind.open(options, recipe(options.recipe or kind.baseline).batch_size)
    model, inputs = open_model(options, loaders)
    if plans(model):
        raise InputError(
            f"--checkpoint {options.checkpoint} is compressed already: sgfx train --checkpoint … --head … trains it on"
        )
    model.eval()
    folder, options = open_folder(options)
    phases: Phases = []
    compression = _compression(options, loaders, inputs)
    if options.recipe is None:
        small = _without_training(options, folder, model, compression)
    else:
        small, phases = _by_recipe(options, folder, model, compression, loaders)
    loaders.report_unreadable()
    rows = {
        name: kind.results(each, loaders, progress=options.progress) | sizes(each, inputs)
        for name, each in (("dense", model), ("compressed", small))
    }
    write_report(folder, rows, inputs, dense=model, small=small)
    if phases:
        plot(folder, phases, kind.best)


def _check(options: CompressOptions) -> None:
    """Refuse what contradicts itself before anything is read."""
    from passes.errors import InputError

    budget = {k: v for k, v in asdict(options.budget).items() if v is not None}
    if (options.ratio is None) != bool(budget) or len(budget) > 1:
        raise InputError("give exactly one of --ratio, --budget.macs and --budget.params")
    if budget and not options.calibration:
        raise InputError("a budget measures on images what each layer can do without: give --calibration 512, say")
    if options.distill.steps and (options.recipe is not None or not options.calibration):
        raise InputError(
            "--distill.steps trains on the --calibration images alone: give these, and no recipe (with one, --teacher "
            "trains towards the dense model)"
        )
    if options.recipe is None and options.head is not None:
        raise InputError("--head puts random weights on the model, which must be trained: give --recipe too")
    if options.recipe is None and options.teacher:
        raise InputError("--teacher is of training by a recipe: give --recipe too")


def _compression(options: CompressOptions, loaders: AnyLoaders, inputs: Arguments) -> dict[str, Any]:
    """The options of `sgfx.compile`."""
    budget = {k: v for k, v in asdict(options.budget).items() if v is not None}
    given: dict[str, Any] = {
        "groups": options.groups,
        "ratio": options.ratio,
        "linear_ratio": options.linear_ratio,
        "budget": budget or None,
        "ignore": options.ignore or None,
        "overrides": options.overrides or None,
        "criterion": options.criterion,
        "eliminate": options.eliminate or None,
    }
    if options.calibration:
        given["calibration"] = loaders.unlabelled(options.calibration)
    if options.task == "detection":  # what can't be traced whole is followed by a run
        given["example_inputs"] = inputs
    return {k: v for k, v in given.items() if v is not None}


def _by_recipe(
    options: CompressOptions, folder: Path, model: nn.Module, compression: dict[str, Any], loaders: AnyLoaders
) -> tuple[nn.Module, Phases]:
    """Compress and train; the recipe keeps everything in the folder."""
    from sgfx.commands.run import adjusted

    outcome = adjusted(options, options.recipe or "", loaders).run(
        model,
        loaders.train,
        loaders.val,
        folder=folder,
        resume=True,
        seed=options.seed,
        progress=options.progress,
        teacher=model if options.teacher else None,
        **compression,
    )
    phases: Phases = [
        (f"step {step.index}", step.achieved_ratio, [record.row() for record in history.epochs])
        for step, history in outcome.steps
    ]
    return outcome.model, [*phases, ("global", None, [record.row() for record in outcome.history.epochs])]


def _without_training(
    options: CompressOptions, folder: Path, model: nn.Module, compression: dict[str, Any]
) -> nn.Module:
    """Compress, and distill if that was asked for; what is finished is read again."""
    import sgfx
    from passes.models import copy_model
    from sgfx.commands.run import FINAL, is_main

    start, final = folder / "compressed.safetensors", folder / FINAL
    for file in (final, start):
        if file.exists():
            small = sgfx.load(file, into=copy_model(model))
            break
    else:
        small = sgfx.compile(model, seed=options.seed, **compression)
        if is_main():
            sgfx.save(small, start)
    if not final.exists():
        if options.distill.steps:
            images, steps = compression["calibration"], options.distill.steps
            sgfx.distill(model, small, images, steps=steps, lr=options.distill.lr, progress=options.progress)
        if is_main():
            sgfx.save(small, final)
    return small
