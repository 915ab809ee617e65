"""What is known of one layer: a frozen, self-checking layer plan, which rides on the layer's module (`attached.py`).

So a compiled backbone keeps its plans inside a detector, and `plans(detector)` finds them under the detector's paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.layers.attached import Attached

LayerShape: TypeAlias = tuple[str, int, int, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """How one layer is grouped and pruned, or why it was left alone.

    Attributes:
        kind: name of the dense layer's class, such as ``"Conv2d"``.
        in_channels: inputs of the dense layer, C_in.
        out_channels: filters of the dense layer, C_out.
        kernel_size: weights of one connection, per dimension; empty for linear layers.
        labels: int64 ``[C_out]``, the group of each filter (eq. 7, 8), or None if the layer was left alone.
        keep: bool ``[groups, C_in]``, the connections that remain (eq. 10, 12), or None if the layer was left alone.
        requested_ratio: the share of connections that was to be pruned, or None if the layer was left alone.
        reason: why the layer was left alone, or None if it is regrouped.
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    labels: Tensor | None = None
    keep: Tensor | None = None
    requested_ratio: float | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        """Check that the plan is either a grouping or a reason, and that the grouping fits the layer."""
        if (self.reason is None) == (self.labels is None or self.keep is None or self.requested_ratio is None):
            raise InputError("a layer plan needs either labels, keep and requested_ratio, or a reason")
        if self.labels is None or self.keep is None or self.requested_ratio is None:
            return
        if self.labels.shape != (self.out_channels,) or self.labels.dtype != torch.int64:
            raise InputError(f"labels must be int64 [{self.out_channels}], not {_describe(self.labels)}")
        groups = self.keep.shape[0]
        if self.keep.shape != (groups, self.in_channels) or self.keep.dtype != torch.bool:
            raise InputError(f"keep must be bool [groups, {self.in_channels}], not {_describe(self.keep)}")
        used = sorted(set(self.labels.tolist()))
        if used != list(range(groups)):
            raise InputError(f"labels must use every group from 0 to {groups - 1}, found {used}")
        if not 0 <= self.requested_ratio < 1:
            raise InputError(f"requested_ratio must lie in [0, 1), not {self.requested_ratio}")

    @classmethod
    def of(cls, layer: nn.Module, **decided: Any) -> LayerPlan:
        """Make the plan of a dense or masked layer: its shape is read from the layer, the rest is given by keyword."""
        return cls(*layer_shape(layer), **decided)

    @property
    def grouped(self) -> bool:
        """Whether the layer is regrouped (False: it was left alone, see `reason`)."""
        return self.reason is None

    @property
    def groups(self) -> int:
        """Number of groups found; 0 for a layer that was left alone."""
        return 0 if self.keep is None else self.keep.shape[0]

    @property
    def block_sizes(self) -> list[tuple[int, int]]:
        """For each group, its number of filters and of the inputs it reads."""
        if self.labels is None or self.keep is None:
            return []
        filters = torch.bincount(self.labels, minlength=self.groups)
        return list(zip(filters.tolist(), self.keep.sum(1).tolist(), strict=True))

    @property
    def connections(self) -> int:
        """Number of (filter, input) pairs that a regrouped layer keeps; 0 for a layer that was left alone."""
        return sum(filters * inputs for filters, inputs in self.block_sizes)

    @property
    def weights(self) -> int:
        """Number of weights of the dense layer, ‖W_l‖₀ of eq. 14."""
        return self.out_channels * self.in_channels * math.prod(self.kernel_size)

    @property
    def achieved_ratio(self) -> float:
        """Share of connections that is pruned, r_l of eq. 13; 0 for a layer that was left alone."""
        return 1 - self.connections / (self.out_channels * self.in_channels) if self.grouped else 0.0

    def mask(self) -> Tensor:
        """Connections that remain, per filter: bool ``[C_out, C_in]``, ``keep[labels]``."""
        if self.labels is None or self.keep is None:
            return torch.ones(self.out_channels, self.in_channels, dtype=torch.bool)
        return self.keep[self.labels]

    def __eq__(self, other: object) -> bool:
        """Plans are equal when all their values are."""
        if not isinstance(other, LayerPlan):
            return NotImplemented
        return self._scalars() == other._scalars() and all(
            a is b or (a is not None and b is not None and torch.equal(a, b))
            for a, b in ((self.labels, other.labels), (self.keep, other.keep))
        )

    def __hash__(self) -> int:
        """Equal plans hash alike."""
        return hash(self._scalars())

    @property
    def shape(self) -> LayerShape:
        """What identifies the dense layer: its kind, channels and kernel."""
        return self.kind, self.in_channels, self.out_channels, self.kernel_size

    def _scalars(self) -> tuple[object, ...]:
        return *self.shape, self.requested_ratio, self.reason


def layer_shape(layer: nn.Module) -> LayerShape:
    """Kind, inputs, filters and kernel size of a dense or masked convolution or linear layer."""
    kind = next((base.__name__ for base in type(layer).__mro__ if base.__module__.startswith("torch.nn.")), "")
    if isinstance(layer, nn.Linear):
        return kind, layer.in_features, layer.out_features, ()
    if isinstance(layer, _ConvNd):
        return kind, layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    raise InputError(f"{type(layer).__name__} is neither a convolution nor a linear layer")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


_PLAN = Attached("plan", LayerPlan)


def attach_plan(module: nn.Module, plan: LayerPlan) -> None:
    """Make `plan` the plan of `module`, in place of an earlier one."""
    _PLAN.put(module, plan)


def detach_plan(module: nn.Module) -> None:
    """Take the plan of `module` away, if it has one."""
    _PLAN.take_off(module)


def plan_of(module: nn.Module) -> LayerPlan | None:
    """Return the plan of `module`, or None if it has none."""
    return _PLAN.of(module)


def plans(model: nn.Module) -> dict[str, LayerPlan]:
    """Return the plans of all layers of `model`, keyed by module path in the order of ``model.named_modules()``.

    Plans are gathered from the submodules, so the plans of a compiled backbone are found in any model that holds it.
    A model that was never compiled has none.
    """
    return _PLAN.all_in(model)


def network_ratios(plans: Mapping[str, LayerPlan]) -> tuple[float, float]:
    """Requested and achieved share of pruned weights over all regrouped layers: Σ r_l‖W_l‖₀ / Σ‖W_l‖₀ (eq. 14)."""
    weights = {path: plan.weights for path, plan in plans.items() if plan.grouped}
    total = sum(weights.values())
    requested = sum((plans[path].requested_ratio or 0) * count for path, count in weights.items())
    achieved = sum(plans[path].achieved_ratio * count for path, count in weights.items())
    return round(requested / total, 12), achieved / total  # rounded, so that a sum of 0.2 each reads 0.2
