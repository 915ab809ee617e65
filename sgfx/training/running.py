"""A recipe that runs: compression and training, phase by phase, from wherever its folder says that it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from passes.elimination import remove_unread_filters
from passes.errors import InputError
from passes.layers import plans
from passes.models import copy_model
from passes.options import as_inputs, listed, resolved_leaves
from sgfx.calibrating import calibrate
from sgfx.compiler import compile as compiled
from sgfx.files.files import load, save
from sgfx.files.writing import replacing
from sgfx.pruner import Pruner, Step
from sgfx.training.accelerator import own_accelerator
from sgfx.training.history import EpochRecord, History
from sgfx.training.loading import Data
from sgfx.training.random_states import generators_in, set_states, states_of
from sgfx.training.run_folder import RunFolder, read_plain, write_csv, write_plain
from sgfx.training.trainer import Trainer

if TYPE_CHECKING:
    from sgfx.training.recipes import Phase, Recipe

M = TypeVar("M", bound=nn.Module)
KIND, GENERATORS = "pruner", "generators"
DECIDED = ("step", "finetune", "inplace")  # options of compile that a recipe decides
LATER = ("budget", "calibration", "eliminate")  # and those that a Pruner doesn't know
Steps = list[tuple[Step, History]]


class Run(Generic[M]):
    """One run of a recipe.

    Args:
        recipe: what is done.
        model: the dense model.
        train_data: for all phases.
        val_data: the same, or None.
        compression: options of `sgfx.compile`.
        training: options of `sgfx.Trainer` that all phases have: teacher, progress.
        seed: of the last phase; the others have the next ones.
        folder: where it is kept, or None.
        resume: whether to go on with what is there.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: M,
        train_data: Data,
        val_data: Data | None,
        compression: Mapping[str, Any],
        training: Mapping[str, Any],
        *,
        seed: int,
        folder: Path | None,
        resume: bool,
    ) -> None:
        """Check the options, and that the folder is this run's.

        Raises:
            InputError: they contradict the recipe, or it holds another run.
        """
        self._recipe, self._model, self._data = recipe, model, (train_data, val_data)
        self._compression, self._training, self._seed = dict(compression), dict(training), seed
        self._folder, self._resume = folder, resume
        self.steps: Steps = []
        options = [] if recipe.local is None else [recipe.local.options]
        transforms = [each.get("transform") for each in (*options, recipe.last.options)]
        self._generators = generators_in([train_data, val_data, compression.get("calibration"), *transforms])
        for name in DECIDED:
            if name in compression:
                raise InputError(f"{name} is decided by the recipe: leave it out, or change the recipe")
        if compression and not recipe.compresses:
            raise InputError(f"recipe {recipe.name!r} compresses nothing: leave out {', '.join(compression)}")
        if recipe.compresses and (compression.get("ratio") is None) == (compression.get("budget") is None):
            raise InputError(
                f"recipe {recipe.name!r} compresses: give exactly one of ratio and budget, as to sgfx.compile"
            )
        if compression.get("budget") is not None and compression.get("calibration") is None:
            raise InputError("budget measures on data what each layer can do without: give calibration too")
        if resume and folder is None:
            raise InputError("resume goes on with what is in a folder: give it too")
        self._there: set[str] = set()
        if folder is not None:
            self._open(folder)

    def compressed(self) -> M:
        """The model as the last phase begins with it."""
        if not self._recipe.compresses:
            return self._model
        if self._folder is not None and "compressed.safetensors" in self._there:
            if "pruner.pt" in self._there:
                self.steps = _read_steps(read_plain(self._folder / "pruner.pt", KIND)["steps"])
            self._draw_on(read_plain(self._folder / "generators.pt", GENERATORS)["processes"])
            return load(self._folder / "compressed.safetensors", into=copy_model(self._model))
        step, local = self._recipe.step, self._recipe.local
        if step is None or local is None:
            small = compiled(self._model, **self._compression)
        else:
            small = self._in_steps(step, local)
        drawn = {"processes": self._drawn()}
        self._write("generators.pt", lambda path: write_plain(path, GENERATORS, drawn))
        self._write("compressed.safetensors", lambda path: save(small, path))
        return small

    def train(self, name: str, model: nn.Module, phase: Phase, seed: int) -> History:
        """Train in a phase, in a folder of its name."""
        folder = None if self._folder is None else self._folder / name
        trainer = Trainer(
            model,
            *self._data,
            **{**phase.arguments(), **self._training},
            folder=folder,
            resume=self._resume and folder is not None,
            seed=(self._seed + seed) % 2**32,
        )
        history = trainer.fit()
        if trainer.averaged is not None:
            model.load_state_dict(trainer.averaged.state_dict())
        return history

    def finish(self, small: nn.Module, history: History) -> None:
        """Write the finished model, and the log of all phases."""
        self._write("log.csv", lambda path: write_csv(path, self._rows(history)))
        self._write("final.safetensors", lambda path: _save(small, path))

    def _in_steps(self, share: float, phase: Phase) -> M:
        """Prune step by step with training after each, and lower."""
        options, model = self._compression, self._model
        saved: dict[str, Any] | None = None
        if "pruner.pt" in self._there and self._folder is not None:
            saved = read_plain(self._folder / "pruner.pt", KIND)
        known = {name: value for name, value in options.items() if name not in LATER}
        if options.get("budget") is not None:
            known |= {"overrides": saved["overrides"] if saved is not None else self._spent(), "ratio": 0.0}
        pruner = Pruner(model, step=share, **known)
        if saved is not None:
            pruner.load_state_dict(saved["pruner"])
            self.steps = _read_steps(saved["steps"])
            self._draw_on(saved["processes"])
        for step in pruner:
            self._keep(pruner, known, step.index - 1)
            self.steps.append((step, self.train(_local(step.index), pruner.model, phase, step.index)))
            self._write("log.csv", lambda path: write_csv(path, self._rows(None)))
        self._keep(pruner, known, len(pruner))
        small = pruner.lower()
        if options.get("calibration") is not None:
            calibrate(model, small, options["calibration"], progress=bool(self._training["progress"]))
        if options.get("eliminate"):
            leaves = resolved_leaves(model, listed(options.get("leaf_modules", ()), "leaf_modules"))
            remove_unread_filters(small, as_inputs(options.get("example_inputs"), model), leaves)
        return small

    def _spent(self) -> dict[str, dict[str, float]]:
        """The ratios that a budget comes to, as overrides, layer by layer."""
        given: Mapping[str, Mapping[str, float]] = self._compression.get("overrides") or {}
        found = plans(compiled(self._model, **self._compression))
        overrides = {entry: dict(values) for entry, values in given.items()}
        for path, plan in found.items():
            if plan.requested_ratio is not None and plan.grouped:
                overrides[path] = {**given.get(path, {}), "ratio": plan.requested_ratio}
        return overrides

    def _keep(self, pruner: Pruner[M], known: Mapping[str, Any], done: int) -> None:
        """Write where the pruner stands; the checkpoint of the step before is not needed any more."""
        content = {
            "pruner": pruner.state_dict(),
            "overrides": known.get("overrides"),
            "processes": self._drawn(),
            "steps": [[asdict(step), [each.to_dict() for each in history.epochs]] for step, history in self.steps],
        }

        def write(path: Path) -> None:
            write_plain(path, KIND, content, tried=False)
            RunFolder(path.parent / _local(done)).last.unlink(missing_ok=True)

        self._write("pruner.pt", write)

    def _drawn(self) -> list[Any]:
        """The states of the data's generators, in all processes: a phase that begins anew must draw on from there."""
        from accelerate.utils import gather_object

        with own_accelerator():
            return list(gather_object([states_of(self._generators)]))

    def _draw_on(self, processes: list[Any]) -> None:
        with own_accelerator() as accelerator:
            set_states(self._generators, processes[accelerator.process_index])

    def _rows(self, last: History | None) -> list[dict[str, Any]]:
        rows = [
            {"phase": "local", "step": step.index, "pruned": step.achieved_ratio, **record.row()}
            for step, history in self.steps
            for record in history.epochs
        ]
        return rows + [{"phase": "global", **record.row()} for record in (last.epochs if last is not None else ())]

    def _open(self, folder: Path) -> None:
        """Make the folder this run's, or see that it is."""
        about = folder / "recipe.json"
        about_run = {"recipe": asdict(self._recipe), "compression": self._compression, "seed": self._seed}
        mine = json.dumps(about_run, indent=2, default=_brief)
        if about.exists() and not self._resume:
            raise InputError(f"{folder} holds a run already: go on with resume=True, or give another folder")
        if about.exists() and (theirs := about.read_text(encoding="utf-8")) != mine:
            lines = (line.strip(" ,") for line in mine.splitlines() if line not in theirs.splitlines())
            raise InputError(
                f"{folder} holds the run of another recipe or of other options: {'; '.join(lines)} is not what "
                f"{about.name} says. Resume with what it says, or give another folder"
            )
        self._there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()

        def write(path: Path) -> None:
            RunFolder(folder).make()
            with replacing(path) as temporary:
                temporary.write_text(mine, encoding="utf-8")

        self._write(about.name, write)

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let the main process write a file of the folder, where there is one, and the others wait."""
        if self._folder is None:
            return
        with own_accelerator() as accelerator:
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write(self._folder / name)
            accelerator.wait_for_everyone()


def _local(index: int) -> str:
    return f"local-{index:02}"


def _read_steps(saved: list[Any]) -> Steps:
    return [(Step(**step), History(tuple(EpochRecord(**each) for each in records))) for step, records in saved]


def _save(model: nn.Module, path: Path) -> None:
    """A compiled model as `sgfx.save` writes it; the state dict of a dense one as safetensors."""
    if plans(model):
        save(model, path)
        return
    from safetensors.torch import save_file

    state = {name: x.detach().cpu().clone() for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    with replacing(path) as temporary:
        save_file(state, temporary)


def _brief(value: object) -> Any:
    """What stands in ``recipe.json`` for options that are no plain data."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}"
    if isinstance(value, Mapping):
        return dict(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
