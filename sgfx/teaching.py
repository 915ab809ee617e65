"""What a dense model teaches in place of labels: its outputs, and those of its blocks.

A block is a module that holds convolutions or linear layers itself, such as a residual block; the model as a whole is
not one. Blocks of two models belong together by their names, where they are called equally often and give tensors of
the same shapes; others are left out, so a teacher of another architecture teaches by its outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from passes.copying import copy_inputs, unhooked_copy
from passes.errors import InputError
from passes.examples import shapes_of

T = TypeVar("T")
BLOCKS = 3.0  # weight of the blocks' mean distance beside that of the outputs


class Teacher:
    """A dense model whose outputs, and those of whose blocks, are the targets of training.

    Args:
        dense: the model; a copy of it without hooks is run, in eval mode, in single precision where it is in half.
    """

    def __init__(self, dense: nn.Module) -> None:
        """Make the copy."""
        self._model = in_single_precision(unhooked_copy(dense)).eval()
        self._blocks = [
            name
            for name, module in dense.named_modules()
            if name and any(isinstance(child, _ConvNd | nn.Linear) for child in module.children())
        ]

    def lesson(self, model: nn.Module, inputs: tuple[Any, ...], run: Callable[[], T]) -> tuple[T, Tensor]:
        """Run a model and tell how far it is from the teacher.

        Args:
            model: the model that is taught.
            inputs: what it is called with; they are not changed.
            run: calls it with them, and returns what it gives.

        Returns:
            What `run` returned, and its distance from the teacher's outputs plus that of the blocks, to be minimised.

        Raises:
            InputError: the teacher can't be run on the inputs, or its outputs have another structure or other shapes.
        """
        with _outputs_of(self._model, self._blocks) as wanted_blocks:
            wanted = self._targets(inputs)
        with _outputs_of(model, self._blocks) as blocks:
            outputs = run()
        loss = distance(outputs, wanted)
        names = [name for name in blocks if _shapes(blocks[name]) == _shapes(wanted_blocks.get(name))]
        if any(_tensors(blocks[name]) for name in names):
            loss = loss + BLOCKS * distance([blocks[n] for n in names], [wanted_blocks[n] for n in names])
        return outputs, loss

    def _targets(self, inputs: tuple[Any, ...]) -> Any:
        for tensor in _tensors(inputs):
            self._model.to(tensor.device)
        try:
            with torch.no_grad():
                return self._model(*in_single_precision(copy_inputs(inputs)))
        except Exception as error:
            raise InputError(f"data of shape {shapes_of(inputs)} do not fit the teacher: {error}") from error


def distance(outputs: Any, wanted: Any) -> Tensor:
    """How far `outputs` are from `wanted`: the squared error over the variance of what is wanted, over all tensors.

    It is 0 where they agree, and about 1 where the outputs say nothing. It has no temperature and asks nothing of what
    they mean. Differentiable in `outputs`.

    Raises:
        InputError: they differ in structure or shape.
    """
    pairs = list(zip(_tensors(outputs), _tensors(wanted), strict=False))
    if _shapes(outputs) != _shapes(wanted) or not pairs:
        raise InputError(
            f"the model's outputs {shapes_of(outputs)} can't be compared with the teacher's {shapes_of(wanted)}: they "
            "must be the same tensors of floating-point numbers"
        )
    errors = [(own.float() - goal.float()).square().mean() / _variance(goal.float()) for own, goal in pairs]
    return torch.stack(errors).mean()


def in_single_precision(value: T) -> T:
    """A model, in place, or tensors, with float32 wherever they are in half precision: small steps are lost there."""

    def raised(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

    return value._apply(raised) if isinstance(value, nn.Module) else pytree.tree_map(raised, value)  # type: ignore[no-untyped-call,no-any-return]


@contextmanager
def _outputs_of(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """What the modules of these names give while this lasts, call after call."""
    found: dict[str, list[Any]] = {}
    modules = dict(model.named_modules())

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found.setdefault(name, []).append(output)

    handles = [modules[name].register_forward_hook(partial(note, name)) for name in names if name in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _shapes(outputs: Any) -> list[torch.Size]:
    return [x.shape for x in _tensors(outputs)]


def _variance(x: Tensor) -> Tensor:
    """The variance of what is wanted, its mean square where it is all the same number, and 1 where that is 0."""
    variance, power = (x - x.mean()).square().mean(), x.square().mean()
    scale = torch.where(variance > 1e-10 * power, variance, power)
    return torch.where(scale < torch.finfo(x.dtype).tiny, 1.0, scale)
