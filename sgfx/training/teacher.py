"""What a dense model teaches in place of labels: its outputs, and those of its blocks.

A block is a module that holds convolutions or linear layers itself, such as a residual block; the model as a whole is
not one. Blocks of two models belong together by their names. They help, and are never asked for: what is called another
number of times, gives other shapes or what can't be compared is left out, so a teacher of another architecture teaches
by its outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from passes.calibration import distance, floating_tensors, relative_error, shapes, single_image, variance_of
from passes.errors import InputError, let_memory_errors_pass
from passes.layers import Grouped
from passes.models import copy_inputs, mapped, shapes_of, unhooked_copy
from passes.options import call_model

T = TypeVar("T")
BLOCKS = 3.0  # weight of the mean distance of all that blocks give, beside that of the outputs


class _Call(NamedTuple):
    """The tensors that go into one call of a block, and that come out."""

    inputs: list[Tensor]
    outputs: list[Tensor]


class Teacher:
    """A dense model whose outputs, and those of whose blocks, are the targets of training.

    Args:
        dense: the model; a copy of it without hooks is run, in eval mode, in single precision where it is in half.

    Attributes:
        model: the copy.
    """

    def __init__(self, dense: nn.Module) -> None:
        """Make the copy."""
        self.model = in_single_precision(unhooked_copy(dense)).eval()
        self._blocks = [
            name
            for name, module in dense.named_modules()
            if name and any(isinstance(child, _ConvNd | nn.Linear | Grouped) for child in module.children())
        ]

    def lesson(self, model: nn.Module, inputs: tuple[Any, ...], run: Callable[[], T]) -> tuple[T, Tensor]:
        """Run a model and tell how far it is from the teacher.

        Args:
            model: the model that is taught.
            inputs: what it is called with; they are not changed.
            run: calls it with them, and returns what it gives.

        Returns:
            What `run` returned, and what is to be minimised: its distance from the teacher's outputs plus `BLOCKS`
            times the mean distance of what the blocks give.

        Raises:
            InputError: the teacher can't be run on the inputs, its outputs have other shapes, or the model's have no
                gradient.
        """
        with _watched(self.model, self._blocks) as theirs:
            wanted = self._targets(inputs)
        with _watched(model, self._blocks) as mine:
            outputs = run()
        loss = distance(outputs, wanted)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError("the model's outputs have no gradient: its forward detaches them, or runs under no_grad")
        blocks = list(_block_distances(mine, theirs))
        return outputs, loss + BLOCKS * torch.stack(blocks).mean() if blocks else loss

    def teach(self, inputs: tuple[Any, ...]) -> Any:
        """What is wanted for these inputs, which may be worked on; without gradients."""
        return call_model(self.model, inputs)

    def _targets(self, inputs: tuple[Any, ...]) -> Any:
        for tensor in floating_tensors(inputs):
            self.model.to(tensor.device)
        try:
            with torch.no_grad():
                return self.teach(in_single_precision(copy_inputs(inputs)))
        except Exception as error:
            let_memory_errors_pass(error)
            hint = single_image(inputs)
            raise InputError(f"data of shape {shapes_of(inputs)} do not fit the teacher: {error}{hint}") from error


def _block_distances(mine: dict[str, list[_Call]], theirs: dict[str, list[_Call]]) -> Iterator[Tensor]:
    """The distance of every tensor that a block gives at every call, where two models' can be compared.

    The error is set against the variance of what the teacher's block gives or reads, whichever is larger: what a
    branch adds may be small beside what it is added to, and need then not be met as well.
    """
    for name, calls in mine.items():
        known = theirs.get(name, [])
        if [shapes(call.outputs) for call in calls] != [shapes(call.outputs) for call in known]:
            continue
        for own, goal in zip(calls, known, strict=True):
            for x, y in zip(own.outputs, goal.outputs, strict=True):
                if _is_finite(y):
                    beside = [z for z in goal.inputs if z.device == y.device and _is_finite(z)]
                    yield relative_error(x, y, torch.stack([variance_of(z) for z in (y, *beside)]).max())


def in_single_precision(value: T) -> T:
    """A model, in place, or tensors, with float32 wherever they are in half precision: small steps are lost there."""

    def raised(x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    return value._apply(raised) if isinstance(value, nn.Module) else mapped(value, raised)  # type: ignore[no-untyped-call]


@contextmanager
def _watched(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[_Call]]]:
    """The calls of the modules of these names while this lasts."""
    found: dict[str, list[_Call]] = {}
    modules = dict(model.named_modules())

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found.setdefault(name, []).append(_Call(_comparable(inputs), _comparable(output)))

    with ExitStack() as hooks:
        for name in names:
            if name in modules and not isinstance(modules[name], torch.jit.ScriptModule):  # these take no hooks
                hooks.callback(modules[name].register_forward_hook(partial(note, name)).remove)
        yield found


def _comparable(outputs: Any) -> list[Tensor]:
    """Those that have numbers at places; tensors inside a transformation of functions are none of ours."""
    plain = [x for x in floating_tensors(outputs) if not torch._C._functorch.is_functorch_wrapped_tensor(x)]
    return [x for x in plain if x.layout == torch.strided and not x.is_nested and x.numel()]


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())
