"""`sgfx.Pruner`: the paper's local scheme inside the user's own training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from passes.compression import PLANS, REASONS, TARGETS, mask, masked_layer, unmask
from passes.errors import InputError, let_memory_errors_pass
from passes.infra import Compilation, Facts, run_passes
from passes.layers import LayerPlan, network_ratios
from passes.models import copy_model
from passes.options import SETTINGS, Criterion, ExampleInputs, LeafModules, checked_settings, checked_step
from passes.pipeline import ANALYSIS, LOWERING, pruning_step
from passes.tracing import REGIONS

M = TypeVar("M", bound=nn.Module)
STATE_VERSION = 1


@dataclass(frozen=True)
class Step:
    """One pruning step.

    Attributes:
        index: number of the step, from 1.
        requested_ratio: cumulative share of the regrouped layers' weights that was to be pruned so far (the
            paper's eq. 14).
        achieved_ratio: the share that is pruned.
    """

    index: int
    requested_ratio: float
    achieved_ratio: float


class Pruner(Generic[M]):
    """Prunes a model step by step, for a training loop of your own.

    ::

        pruner = sgfx.Pruner(model, groups=8, ratio=0.8, step=0.05)
        for step in pruner:
            train(pruner.model, epochs=4)  # masked: an ordinary module with the dense parameters
        small = pruner.lower()

    At step ``s`` each layer is pruned to ``min(s · step, its ratio)``: importance, groups and masks are worked out anew
    from the masked weights. Parameters stay the same objects until `lower`, so one optimizer serves all steps. A step
    is complete when the next one is asked for: leaving the loop inside a step and entering it again repeats that step,
    without clustering again.

    Attributes:
        model: the masked copy of the model, to be trained in place.
    """

    @torch.inference_mode(False)  # or what is made here could never be trained
    def __init__(
        self,
        model: M,
        *,
        groups: int = 8,
        ratio: float,
        step: float,
        linear_ratio: float | None = None,
        ignore: str | nn.Module | Iterable[str | nn.Module] = (),
        overrides: Mapping[str, Mapping[str, float]] | None = None,
        criterion: Criterion = "l1",
        example_inputs: ExampleInputs | None = None,
        seed: int = 0,
        leaf_modules: LeafModules = (),
    ) -> None:
        """Copy `model`, select its layers and put masked layers in their places, with nothing pruned yet.

        Args are those of `sgfx.compile`; `step` is the share of each layer's connections pruned per step, in (0, 1).

        Raises:
            InputError: (a ValueError) the model or an option can't be compiled; names the layer and the way out.
            TypeError: an argument is of the wrong type.
        """
        settings = checked_settings(
            model,
            groups=groups,
            ratio=ratio,
            linear_ratio=linear_ratio,
            ignore=ignore,
            overrides=overrides,
            criterion=criterion,
            example_inputs=example_inputs,
            seed=seed,
            leaf_modules=leaf_modules,
        )
        self._step = checked_step(step)
        self.model: M = self._taken(model)
        analysed = run_passes(ANALYSIS, Compilation(self.model, {SETTINGS: settings}))
        analysed.take(REGIONS).empty()
        self._settings, self._targets, self._reasons = settings, analysed[TARGETS], analysed[REASONS]
        self._plans: dict[str, LayerPlan] = {}
        for path in self._targets:
            masked_layer(self.model, path)
        self._index = 0
        self._open = False  # whether step `_index` was handed out and is not complete yet
        self._lowered = False

    def _taken(self, model: M) -> M:
        """The model that is pruned: a copy, so that the user's stays as it is."""
        return copy_model(model)

    def __len__(self) -> int:
        """Number of steps in total."""
        ratio = max(target.ratio for target in self._targets.values())
        return max(1, math.ceil(ratio / self._step - 1e-9))

    def __iter__(self) -> Iterator[Step]:
        """Prune step by step, from where the pruner stands; see the class."""
        self._check_not_lowered("iterate")
        while self._open or self._index < len(self):
            if not self._open:
                self._advance()
            step = self._record()
            yield step
            self._check_not_lowered("go on")
            if step.index == self._index:
                self._open = False

    @torch.inference_mode(False)
    def _advance(self) -> None:
        index = self._index + 1
        known: Facts = {SETTINGS: self._settings, TARGETS: self._targets, REASONS: self._reasons}
        self._plans = run_passes(pruning_step(self._limit(index)), Compilation(self.model, known))[PLANS]
        self._index, self._open = index, True

    def _limit(self, index: int) -> float:
        """No layer is pruned beyond this share at a step."""
        return 1.0 if index == len(self) else round(index * self._step, 12)

    def _record(self) -> Step:
        requested, achieved = network_ratios(self._plans)
        return Step(self._index, requested, achieved)

    @torch.inference_mode(False)
    def lower(self) -> M:
        """Regroup the masked model physically, in place, and return it: `model` is then the small model.

        Make a new optimizer for further training: the regrouped layers have new weights, which an old one doesn't know.

        It may be called before all steps are done, and lowers what is masked then.

        Raises:
            InputError: it was called before, or before the first step.
        """
        self._check_not_lowered("lower")
        if self._index == 0:
            raise InputError("nothing is pruned yet: iterate over the pruner before lower()")
        run_passes(LOWERING, Compilation(self.model, {SETTINGS: self._settings, PLANS: self._plans}))
        self._lowered = True
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in a new process, the model's state included.

        Holds tensors, numbers and strings only: ``torch.save`` it, read it with ``torch.load(…, weights_only=True)``.
        As with modules, its tensors are the live ones.
        """
        self._check_not_lowered("save")
        return {
            "version": STATE_VERSION,
            "options": self._options(),
            "index": self._index,
            "open": self._open,
            "plans": {
                path: {"labels": plan.labels, "keep": plan.keep, "requested_ratio": plan.requested_ratio}
                for path, plan in self._plans.items()
                if plan.grouped
            },
            "model": self.model.state_dict(),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. The pruner must be made from the same kind of model with the same options.

        A state that was saved in the body of the loop repeats that step.

        Raises:
            InputError: the state is not a pruner's, or belongs to another model or other options. Nothing is changed.
        """
        self._check_not_lowered("load into")
        self._check_state(state)
        plans = self._loaded_plans(state["plans"]) if state["index"] else {}
        try:
            self._restore(copy_model(self.model), plans, state["model"])
        except Exception as error:  # values can be anything, and modules may refuse what they are given
            let_memory_errors_pass(error)
            raise InputError(f"the state's model can't be loaded, and nothing was changed: {error}") from error
        self._restore(self.model, plans, state["model"])
        self._plans = plans
        self._index, self._open = state["index"], state["open"]

    def _restore(self, model: nn.Module, plans: dict[str, LayerPlan], values: Mapping[str, Any]) -> None:
        """Give `model`, which is masked somehow, the masks of `plans` and the values of a state, in place."""
        if plans:
            mask(model, plans)
        else:
            unmask(model, [*self._targets, *self._reasons])
        model.load_state_dict(values)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        expected = {"version", "options", "index", "open", "plans", "model"}
        if not isinstance(state, Mapping) or state.keys() != expected:
            raise InputError("this is not the state of a Pruner (as its state_dict() gives)")
        if state["version"] != STATE_VERSION:
            raise InputError(f"the state has version {state['version']}, this sgfx reads version {STATE_VERSION}")
        index = state["index"]
        if not isinstance(index, int) or not 0 <= index <= len(self) or not isinstance(state["open"], bool):
            raise InputError(f"the state stands at step {index!r} of {len(self)}: the file is damaged")
        if not all(isinstance(state[key], Mapping) for key in ("options", "plans", "model")):
            raise InputError("the state's options, plans and model must be dicts: the file is damaged")
        mine, theirs = self._options(), state["options"]
        other = [
            f"{key} ({theirs.get(key)!r} in the state, {mine[key]!r} here)"
            for key in mine
            if theirs.get(key) != mine[key]
        ]
        if other:
            raise InputError("the state was saved with other options: " + ", ".join(other))
        masks = {f"{path}.{name}" for path in self._targets for name in ("_extra_state", "mask")}
        shapes, given = (
            {name: getattr(tensor, "shape", None) for name, tensor in each.items() if name not in masks}
            for each in (self.model.state_dict(), state["model"])
        )
        wrong = sorted(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        if wrong:
            raise InputError(f"the state belongs to another model: {', '.join(wrong[:3])} differ ({len(wrong)} in all)")

    def _loaded_plans(self, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, LayerPlan]:
        if saved.keys() != self._targets.keys():
            raise InputError("the state belongs to another model: it prunes other layers")
        made = {}
        for path, layer in self.model.named_modules():
            if path in saved:
                made[path] = _loaded_plan(path, layer, saved[path])
            elif path in self._reasons:
                made[path] = LayerPlan.of(layer, reason=self._reasons[path])
        return made

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        criterion = settings.criterion if isinstance(settings.criterion, str) else "callable"
        return {
            "groups": settings.groups,
            "ratio": settings.ratio,
            "linear_ratio": settings.linear_ratio,
            "ignore": list(settings.ignore),
            "overrides": {entry: dict(values) for entry, values in settings.overrides.items()},
            "criterion": criterion,
            "seed": settings.seed,
            "step": self._step,
        }

    def _check_not_lowered(self, action: str) -> None:
        if self._lowered:
            raise InputError(f"can't {action}: lower() was called, and its result is the model; make a new Pruner")


def _loaded_plan(path: str, layer: nn.Module, saved: object) -> LayerPlan:
    try:
        if not isinstance(saved, Mapping):
            raise TypeError(f"it is a {type(saved).__name__}")
        decided = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in saved.items()}
        return LayerPlan.of(layer, **decided)
    except (TypeError, AttributeError, InputError) as error:
        raise InputError(f"the state's plan of layer {path!r} is damaged: {error}") from error
