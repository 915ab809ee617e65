"""Chains: packed layers of a network that follow each other, run as one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError
from passes.kernel import threads
from passes.kernel.module import PackedConv2d, is_traced, remember
from passes.kernel.program import Program, Step, bind, execute, program


class PackedChain(nn.Module):
    """Packed convolutions that call each other's results; those that nobody else reads are never handed out.

    Args:
        layers: the layers, in the order in which they run.
        reads: for each layer, the numbers of the tensor that it reads and of the residual that it adds (or None): the
            inputs of the chain come first, then the results of the layers.
        outputs: the layers whose results are returned.
    """

    def __init__(
        self, layers: Sequence[PackedConv2d], reads: Sequence[tuple[int, int | None]], outputs: Sequence[int]
    ) -> None:
        """Take over the layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reads, self.outputs = tuple(reads), tuple(outputs)
        self._programs: dict[Any, Program] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Compute the chain: fp32 ``[N, C, H, W]``, margins included; a tuple if there is more than one output."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise InputError("packed layers are for inference: they have no gradient. Call them under torch.no_grad()")
        results = self._one_by_one(inputs) if any(map(is_traced, inputs)) else self._at_once(inputs)
        return tuple(results) if len(self.outputs) > 1 else results[0]

    def _at_once(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        shapes, team = [x.shape for x in inputs], threads.available()
        key = (*shapes, team)
        found = self._programs.get(key)
        if found is None:
            layers: list[Any] = list(self.layers)
            steps = [
                Step(layer.form, len(layer.blocks) - 1, *reads) for layer, reads in zip(layers, self.reads, strict=True)
            ]
            planned = program(steps, self.outputs, shapes, team)
            found = remember(self._programs, key, bind(planned, [layer.tables for layer in layers]))
        return execute(found, inputs)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        known = list(inputs)
        for layer, (read, added) in zip(self.layers, self.reads, strict=True):
            known.append(layer(known[read], None if added is None else known[added]))
        return [known[len(inputs) + index] for index in self.outputs]

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._programs.clear()  # they hold the addresses of tensors that may move now
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """Programs hold addresses of this process."""
        return {**self.__dict__, "_programs": {}}
