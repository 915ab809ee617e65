"""Error curves: what a layer loses at which ratio, measured before anything is pruned.

A layer's error curve says what is left of its error after re-solving its weights, at a grid of ratios: the squared
error of its output over the variance of what is passed on (behind the norm, with what another branch adds). It is
solved on the first half of the rows and measured on the rest: with few rows, every layer could be fitted to its own.

All curves come from one walk of the dense model beside itself, in which each layer is one group that reads all inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from passes.calibration.data import EXAMPLES
from passes.calibration.layer_solver import Sample
from passes.calibration.least_squares import factor, ridge, solve, solve_dual
from passes.calibration.paired_walk import Walk
from passes.calibration.pairing import walkable_regions
from passes.calibration.sampling import followers_at, overflow, sample_at
from passes.compression.grouping import GROUPS, Groups
from passes.compression.lowering import lower
from passes.compression.pruning import truncate
from passes.compression.selection import TARGETS
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.progress import Progress, silent
from passes.infra.random_state import own_random_state
from passes.layers.plan import LayerPlan
from passes.models.copying import unhooked_copy
from passes.options.settings import SETTINGS

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
Curve: TypeAlias = NDArray[np.float64]
CURVES = Fact[Mapping[str, Curve]]("error curves")  # of the targets that the walk reaches, by path


class ErrorCurves(Pass):
    """Measure the error curve of each target.

    Args:
        progress: shows how far it is.
    """

    name = "error curves"
    requires = (SETTINGS, TARGETS, GROUPS, EXAMPLES)
    ensures = (CURVES,)

    def __init__(self, progress: Progress = silent) -> None:
        """Take what shows it."""
        self._progress = progress

    def run(self, compilation: Compilation) -> Facts:
        """Walk through the model, beside a copy of it that has stops at the targets."""
        model, targets, batches = compilation.model, compilation[TARGETS], compilation[EXAMPLES]
        whole = unhooked_copy(model).eval()
        lower(whole, {path: _whole(model.get_submodule(path)) for path in targets})
        curves: dict[str, Curve] = {}
        bar = self._progress("budget", len(targets), "layer")
        regions = walkable_regions(model, whole, batches, compilation[SETTINGS].leaf_modules)
        with own_random_state(), torch.no_grad(), bar as tick:
            for path, theirs, mine, pairs in regions:
                walk = Walk(theirs, mine, pairs, path)
                for stop in walk.stops():
                    name = walk.name(stop)
                    sample = sample_at(walk, stop, followers_at(walk, stop))
                    tick()
                    if len(sample.wanted):
                        curves[name] = error_curve(walk.module(stop), sample, compilation[GROUPS][name])
                        if not np.isfinite(curves[name]).all():
                            raise overflow(name)
        return {CURVES: curves}

    def check(self, compilation: Compilation) -> str | None:
        """Errors are not negative, and grow with the ratio."""
        curves = compilation[CURVES].items()
        wrong = (path for path, curve in curves if curve[0] < 0 or (np.diff(curve) < 0).any())
        return next((f"the error of layer {path!r} falls where more is pruned" for path in wrong), None)


def _whole(layer: nn.Module) -> LayerPlan:
    """The plan of a layer as one group that reads all inputs: as fast as the dense layer, and a stop of the walk."""
    out_channels, in_channels = layer.get_parameter("weight").shape[:2]
    labels, keep = torch.zeros(out_channels, dtype=torch.long), torch.ones(1, in_channels, dtype=torch.bool)
    return LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=0.0)


def error_curve(layer: Any, sample: Sample, groups: Groups) -> Curve:
    """The error that is left of a layer at each ratio of `GRID`, re-solved: 0 for none, 1 where nothing is explained.

    Args:
        layer: the layer as a grouped one with nothing pruned.
        sample: what it reads and should yield.
        groups: its labels and centroids.
    """
    start = layer.dense_weight().double().flatten(1)
    halves = _halves(sample)
    if start.shape[1] <= len(halves.x):
        left_of: Callable[[Tensor, Tensor, Tensor], Tensor] = _Primal(halves).left_of
    else:
        left_of = halves.left_of
    weight = sample.scale.square()
    taps = start.shape[1] // groups.centroids.shape[1]
    members = [(groups.labels == group).nonzero().flatten() for group in range(len(groups.centroids))]
    errors = []
    for ratio in GRID:
        kept = truncate(groups.centroids, torch.bincount(groups.labels), ratio).repeat_interleave(taps, 1)
        pairs = [(filters, keep.nonzero().flatten()) for filters, keep in zip(members, kept, strict=True)]
        errors.append(sum(float(left_of(f, k, start[f][:, k]) @ weight[f]) for f, k in pairs))
    passed_on = (sample.wanted[-len(halves.rest_y) :] - sample.wanted.mean(0)).square().sum()
    relative = np.array(errors) / max(float(passed_on), 1e-300)
    return np.maximum.accumulate(relative.clip(min=0.0))


@dataclass(frozen=True)
class _Halves:
    """Rows to solve on, the rest to measure on, both less the mean of the first, and the ridge of the first."""

    x: Tensor
    y: Tensor
    rest_x: Tensor
    rest_y: Tensor
    penalty: Tensor

    def left_of(self, filters: Tensor, keep: Tensor, start: Tensor) -> Tensor:
        """The squared error ``[filters]`` on the rest, with the kept inputs re-solved from `start`; by the dual."""
        x = self.x[:, keep]
        weight = start + solve_dual(x, self.y[:, filters] - x @ start.T, self.penalty)
        return (self.rest_y[:, filters] - self.rest_x[:, keep] @ weight.T).square().sum(0)


def _halves(sample: Sample) -> _Halves:
    y = (sample.wanted - sample.offset) / torch.where(sample.scale == 0, 1.0, sample.scale)
    half = len(y) // 2 or len(y)  # a single row is all there is
    x = sample.inputs - sample.inputs[:half].mean(0, dtype=torch.float64)
    y -= y[:half].mean(0)
    rest = slice(half, None) if half < len(y) else slice(None)
    return _Halves(x[:half], y[:half], x[rest], y[rest], ridge(x[:half].square().sum(0)))


class _Primal:
    """The same from products that all groups and ratios share, which is less work where rows are many."""

    def __init__(self, halves: _Halves) -> None:
        self._gram, self._cross = halves.x.T @ halves.x, halves.x.T @ halves.y
        self._rest_gram, self._rest_cross = halves.rest_x.T @ halves.rest_x, halves.rest_x.T @ halves.rest_y
        self._power = halves.rest_y.square().sum(0)
        self._ridge = halves.penalty

    def left_of(self, filters: Tensor, keep: Tensor, start: Tensor) -> Tensor:
        """See `_Halves.left_of`."""
        cells = keep[:, None], keep
        cross = self._cross[keep[:, None], filters] - self._gram[cells] @ start.T
        weight = start + solve(factor(self._gram, keep, self._ridge), cross)
        outer = self._rest_cross[keep[:, None], filters].T
        return self._power[filters] + ((weight @ self._rest_gram[cells]) * weight).sum(1) - 2 * (weight * outer).sum(1)
