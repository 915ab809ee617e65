"""An oracle for compiled models, which shares no code with the compiler.

All it asks of a compiled model is what its layers say of themselves: the layer plans (`sgfx.plans`), and what is left
of each module's channels after elimination. From the plans it makes the *masked* model: the dense one, with zeros in
the places of the pruned weights. The compiled model must then have

- the masked model's outputs, in eval and in train mode;
- in train mode its gradients: those of the kept weights and of all other parameters;
- its buffers afterwards (running statistics), of every channel that is left;
- and whatever elimination removed must have had a gradient of exactly zero.

A difference is the largest one of a tensor, divided by the tensor's largest value. Gradients that are zero in exact
arithmetic (a bias in front of a batch norm) are rounding noise in both models, so a gradient's divisor is at least
``NOISE`` times the largest gradient of the model.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sgfx

NOISE = 1e-4
DROPS = ("dropout", "attention_dropout", "drop_rate", "dropout_rate", "drop_prob")


class Remaining(Protocol):
    """What remains of a module's channels, as indices in dense numbering; None where all do."""

    @property
    def outputs(self) -> Tensor | None:
        """Filters that remain."""

    @property
    def inputs(self) -> Tensor | None:
        """Inputs that remain."""


@dataclass(frozen=True)
class Run:
    """What one forward (and in train mode backward) pass showed.

    Attributes:
        outputs: the model's output tensors, then those of the tapped modules.
        gradients: of each parameter that got one, by name; empty in eval mode.
        buffers: the floating-point buffers after the pass, by name.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Differences:
    """The largest relative differences between two models, and the tensor that has the very largest."""

    outputs: float
    gradients: float
    buffers: float
    worst: str

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(self.outputs, self.gradients, self.buffers)


def prepare(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make a freshly built model fit for the comparison, in place, and return it.

    Dropout and stochastic depth are switched off. Parameters and statistics that start out constant (norms, biases,
    layer scales; some of them zero, which would hide everything behind them) get random values.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if type(module).__name__.startswith(("Dropout", "AlphaDropout", "FeatureAlphaDropout", "StochasticDepth")):
            module.__dict__["p"] = 0.0
        for name in DROPS:
            if isinstance(module.__dict__.get(name), float):
                module.__dict__[name] = 0.0
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or not tensor.numel() or bool((tensor != tensor.flatten()[0]).any()):
                continue
            values = torch.rand(tensor.shape, generator=generator) + 0.5
            if name.endswith(("bias", "beta", "running_mean")):
                values = 0.1 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values)
    return model


def mask(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Set the weights of `dense` that `small` has pruned to zero, in place, and return it."""
    for path, plan in sgfx.plans(small).items():
        if plan.labels is not None and plan.keep is not None:
            weight = dense.get_submodule(path).weight
            weight.data[~plan.keep[plan.labels]] = 0  # type: ignore[operator]
    return dense


def run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    training: bool,
    taps: Collection[str] = (),
    sample: Collection[str] | None = None,
) -> Run:
    """Run `model` once, from the same random state every time; in train mode backward too.

    Args:
        model: any module; its mode and its gradients change.
        inputs: positional arguments of its forward; they are copied first.
        training: the mode.
        taps: paths of modules whose outputs are noted too.
        sample: names of the parameters whose gradients are wanted; None means all.
    """
    model.train(training)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if sample is not None:
            parameter.requires_grad_(name in sample)
    inputs = pytree.tree_map_only(Tensor, torch.clone, inputs)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with torch.set_grad_enabled(training), tapped(model, taps) as seen:
        outputs = tensors_of(model(*inputs))
    if training:
        torch.autograd.backward(_loss(outputs))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    return Run([tensor.detach() for tensor in outputs + seen], grads, buffers)


@contextmanager
def tapped(model: nn.Module, paths: Collection[str]) -> Iterator[list[Tensor]]:
    """Note the outputs of the modules at `paths`, in order of their calls."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: object, output: object) -> None:
        seen.extend(tensor.detach().clone() for tensor in tensors_of(output))

    handles = [model.get_submodule(path).register_forward_hook(note) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare(masked: Run, small: Run, model: nn.Module, cuts: Mapping[str, Remaining]) -> Differences:
    """Compare the compiled model's run with the masked model's.

    Args:
        masked: the run of the masked model.
        small: the run of the compiled model, in the same mode.
        model: the compiled model.
        cuts: what elimination left of each module it cut.

    Raises:
        AssertionError: the runs do not even match in structure, or something that was eliminated had a gradient.
        ValueError: the masked model's own numbers are not finite, so that nothing can be said.
    """
    errors = {f"output {i}": error for i, error in enumerate(_outputs(masked.outputs, small.outputs))}
    layout = Layout(model, cuts)
    largest = max((float(g.abs().max()) for g in masked.gradients.values() if g.numel()), default=0.0)
    gradients, buffers = {}, {}
    for name, expected in masked.gradients.items():
        kept, rest = layout.split(name, expected)
        assert not rest.any(), f"{name} was eliminated in part, where its gradient is not zero"
        if kept.numel():
            actual = small.gradients.get(name)
            actual = torch.zeros_like(kept) if actual is None else actual
            gradients[name] = _relative(actual, kept, name, floor=NOISE * largest)
    for name, actual in small.buffers.items():
        if name in masked.buffers:
            expected = layout.split(name, masked.buffers[name])[0]
            buffers[name] = _relative(actual, expected, name)
    unexpected = [name for name in small.gradients.keys() - masked.gradients.keys() if small.gradients[name].any()]
    assert not unexpected, f"gradients that the masked model does not have: {unexpected}"
    every = errors | gradients | buffers
    worst = max(every, key=lambda name: every[name]) if every else ""
    of_outputs, of_gradients, of_buffers = (max(each.values(), default=0.0) for each in (errors, gradients, buffers))
    return Differences(of_outputs, of_gradients, of_buffers, worst)


class Layout:
    """Where the entries of the compiled model's parameters and buffers lie in those of the dense model."""

    def __init__(self, model: nn.Module, cuts: Mapping[str, Remaining]) -> None:
        """Note the plans and the cuts of a compiled model."""
        self.modules = dict(model.named_modules())
        self.names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        self.plans = sgfx.plans(model)
        self.cuts = cuts

    def split(self, name: str, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Split a dense tensor into what the compiled model holds, in its own layout, and what was eliminated."""
        path, _, leaf = name.rpartition(".")
        plan, cut = self.plans.get(path), self.cuts.get(path)
        grouped = leaf == "weight" and plan is not None and plan.labels is not None
        if name in self.names and cut is None and not grouped:
            return dense, dense.new_zeros(0)
        rows = dense.flatten(0, 1) if dense.dim() > 1 else dense.view(-1)
        index = torch.arange(len(rows)).view(dense.shape[:2])
        places = self._places(index, path, leaf, grouped) if name in self.names else index.flatten()[:0]
        eliminated = torch.ones(len(rows), dtype=torch.bool)
        if grouped:
            eliminated.view(index.shape)[~plan.keep[plan.labels]] = False  # type: ignore[union-attr, index]
        eliminated[places.flatten()] = False
        kernel = dense.shape[2:] or ((1,) if grouped else ())
        return rows[places.flatten()].view(*places.shape, *kernel), rows[eliminated].flatten()

    def _places(self, index: Tensor, path: str, leaf: str, grouped: bool) -> Tensor:
        cut = self.cuts.get(path)
        outputs = None if cut is None else cut.outputs
        inputs = None if cut is None else cut.inputs
        if grouped:
            return _packed(index, self.plans[path], outputs, inputs)
        if isinstance(self.modules[path], nn.modules.conv._ConvTransposeNd) and leaf == "weight":
            outputs, inputs = inputs, outputs
        if outputs is not None and index.dim():
            index = index[outputs]
        if inputs is not None and index.dim() > 1 and getattr(self.modules[path], "groups", 1) == 1:
            index = index[:, inputs]
        return index


def _packed(index: Tensor, plan: Any, outputs: Tensor | None, inputs: Tensor | None) -> Tensor:
    """Rows of the packed weight: group after group, in it filter after filter, in it input after input."""
    alive = torch.zeros(plan.keep.shape[1], dtype=torch.bool)
    alive[slice(None) if inputs is None else inputs] = True
    present = torch.zeros(plan.out_channels, dtype=torch.bool)
    present[slice(None) if outputs is None else outputs] = True
    blocks = [
        index[present & (plan.labels == group)][:, plan.keep[group] & alive].flatten()
        for group in range(plan.keep.shape[0])
    ]
    return torch.cat(blocks)


def _outputs(masked: Sequence[Tensor], small: Sequence[Tensor]) -> list[float]:
    assert len(masked) == len(small), f"{len(small)} outputs instead of {len(masked)}"
    return [_relative(b, a, f"output {i}") for i, (a, b) in enumerate(zip(masked, small, strict=True))]


def _relative(actual: Tensor, expected: Tensor, name: str, floor: float = 0.0) -> float:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name} differs"
        return 0.0
    if not expected.numel():
        return 0.0
    if not bool(expected.isfinite().all()):
        raise ValueError(f"the masked model's {name} is not finite")
    difference = float((actual - expected).abs().max())
    divisor = max(float(expected.abs().max()), floor)
    return difference / divisor if divisor else float(difference > 0)


def tensors_of(output: object) -> list[Tensor]:
    """The tensors among what a model gives, dataclasses included."""
    leaves = pytree.tree_leaves(output)
    fields = [tensors_of(list(vars(leaf).values())) if is_dataclass(leaf) else [leaf] for leaf in leaves]
    return [leaf for each in fields for leaf in each if isinstance(leaf, Tensor)]


def _loss(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar in which every output entry has a weight of its own."""
    generator = torch.Generator().manual_seed(1)
    terms = [
        (tensor * torch.randn(tensor.shape, generator=generator).to(tensor)).sum()
        for tensor in outputs
        if tensor.requires_grad
    ]
    return torch.stack(terms).sum()
