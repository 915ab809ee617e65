"""A `Pruner` on a live model that a training loop holds, and what becomes of the loop's optimizers at lowering.

1. The model is pruned in place: whoever holds it, or its parameters, goes on with the same objects until lowering.
2. A state dict says by itself at which step it was saved: the structures of its layers name their requested ratios.
   Loading one into the model (`load_state_dict`, whoever calls it) first takes the model to that step, lowered or not.
3. At lowering, each packed weight takes the place of its dense weight in the optimizer: the group, with its rate and
   decay, and the state (momentum) of the connections that remain. Schedulers read the groups, and stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from passes.errors import InputError
from passes.layers import Grouped, LayerPlan, LayerShape, decode, layer_shape
from sgfx.pruner import Pruner

M = TypeVar("M", bound=nn.Module)


class LivePruner(Pruner[M]):
    """A `Pruner` that works on the model itself, and follows the state dicts that are loaded into it."""

    def __init__(self, model: M, **options: Any) -> None:
        """Put masked layers into `model`, in place; see `Pruner`."""
        super().__init__(model, **options)
        self._weights: dict[str, Tensor] = {path: model.get_submodule(path).weight for path in self._targets}  # type: ignore[misc]
        self._shapes: dict[str, LayerShape] = {p: layer_shape(model.get_submodule(p)) for p in self._targets}
        self._steps = iter(self)
        model.register_load_state_dict_pre_hook(_Follower(self))  # type: ignore[no-untyped-call]

    @property
    def index(self) -> int:
        """Number of pruning steps that were made."""
        return self._index

    @property
    def lowered(self) -> bool:
        """Whether the model is lowered."""
        return self._lowered

    def advance(self) -> None:
        """Make the next pruning step."""
        next(self._steps)

    def lower_for(self, optimizers: Iterable[Optimizer]) -> None:
        """Lower the model in place, and give the optimizers its new weights."""
        optimizers = list(optimizers)
        self.lower()
        replaced = {}
        for path, old in self._weights.items():
            layer = self.model.get_submodule(path)
            if isinstance(layer, Grouped):
                replaced[id(old)] = layer
        for optimizer in optimizers:
            replace_parameters(optimizer, replaced)

    def lower(self) -> M:
        """As a `Pruner` does. What a library has put around the model's forward since (autocast) stays around it."""
        around = self.model.__dict__.pop("forward", None)
        try:
            return super().lower()
        finally:
            if around is not None:
                self.model.__dict__["forward"] = around

    def follow(self, state: Mapping[str, Any], prefix: str) -> None:
        """Take the model to the step at which a state dict was saved.

        Raises:
            InputError: it was saved without the callback, with other options, or before the model here was lowered.
        """
        plans = {path: self._plan(path, state, prefix) for path in self._weights}
        weights = ((state.get(f"{prefix}{path}.weight"), old) for path, old in self._weights.items())
        lowered = any(getattr(weight, "shape", None) != old.shape for weight, old in weights)
        index = self._step_of(plans)
        if self._lowered:
            mine = {path: self.model.get_submodule(path) for path in plans}
            same = all(isinstance(layer, Grouped) for layer in mine.values())
            if not (lowered and same):
                raise InputError("the weights are from before lowering, and the model is lowered: make a fresh one")
            return  # whether the structures agree, each layer says itself
        if index == 0 and self._index == 0:
            return
        saved = {
            path: {"labels": plan.labels, "keep": plan.keep, "requested_ratio": plan.requested_ratio}
            for path, plan in plans.items()
        }
        own = {name: value for name, value in self.model.state_dict().items() if not name.endswith("_extra_state")}
        structures = {f"{path}._extra_state": state[f"{prefix}{path}._extra_state"] for path in plans}
        now = super().state_dict()
        self.load_state_dict(
            {**now, "index": index, "open": False, "plans": saved if index else {}, "model": own | structures}
        )
        self._steps = iter(self)
        if lowered:
            self.lower()

    def _taken(self, model: M) -> M:
        return model

    def _plan(self, path: str, state: Mapping[str, Any], prefix: str) -> LayerPlan:
        key = f"{prefix}{path}._extra_state"
        if key not in state:
            raise InputError(f"the weights were saved without PruningCallback, or in parts: there is no {key!r}")
        try:
            return decode(state[key], self._shapes[path])
        except InputError as error:
            raise InputError(f"layer {path!r}: {error}") from error

    def _step_of(self, plans: Mapping[str, LayerPlan]) -> int:
        """The step at which layers have these requested ratios."""
        ratios = {path: target.ratio for path, target in self._targets.items()}
        for index in range(len(self) + 1):
            limit = 0.0 if index == 0 else self._limit(index)
            if all(plan.requested_ratio == min(limit, ratios[path]) for path, plan in plans.items()):
                return index
        raise InputError("the weights were pruned with another ratio, step or overrides than PruningCallback was given")


class _Follower:
    """The hook before `load_state_dict`. Copies of the model have it too, and for them it does nothing."""

    def __init__(self, pruner: LivePruner[Any]) -> None:
        self._pruner: LivePruner[Any] | None = pruner
        self._busy = False

    def __call__(self, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        pruner = self._pruner
        if pruner is None or module is not pruner.model or self._busy:
            return
        self._busy = True
        try:
            pruner.follow(state, prefix)
        finally:
            self._busy = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Follower:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_pruner": None, "_busy": False}


def replace_parameters(optimizer: Optimizer, replaced: Mapping[int, Grouped]) -> None:
    """Give an optimizer packed weights for dense ones, in place.

    State of a dense weight's shape keeps the rows of the connections that remain, and numbers stay. A weight whose
    state has other tensors (sums over its rows, say) starts without one.

    Args:
        optimizer: its groups keep their options, their number and their order.
        replaced: by the ``id`` of a dense weight ``[C_out, C_in, *kernel]`` the grouped layer that was made of it.
    """
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            if id(old) not in replaced:
                continue
            layer = replaced[id(old)]
            new = layer.weight
            group["params"][place] = new
            state = optimizer.state.pop(old, None)
            if state and all(_numbers(value) or value.shape == old.shape for value in state.values()):
                optimizer.state[new] = {
                    key: value if _numbers(value) else layer.packed_rows(value).view_as(new)
                    for key, value in state.items()
                }


def _numbers(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0
