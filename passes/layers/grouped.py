"""Grouped layers: physically regrouped convolutions and linear layers, what `sgfx.compile` returns.

One packed parameter ``weight`` of shape ``[connections, *kernel]`` (linear: ``[connections, 1]``) holds a row for every
kept (filter, input) pair, group after group; within a group filter after filter, each with the inputs of its group in
ascending order. The block of a group is a view of it. Tables (`structured.py`), in the numbering of the dense layer:

- ``filters`` ``[C_out]``: the filters of each group, side by side (P_out of eq. 17);
- ``inputs`` ``[Σ m_g]``: what each group reads, one after the other (P_in of eq. 17);
- ``block_sizes`` ``[groups, 2]``: how many filters and inputs each group has.

A layer runs in one of two forms. ``"dense"`` scatters the rows into a dense weight and calls the library once: the
default. ``"blocks"`` gathers the inputs of each group, computes its block and puts it in its place: the paper's
deployment. Both give the same numbers; ``form`` is a plain attribute and not part of the state dict.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.errors import InputError
from passes.layers.blocks import in_blocks
from passes.layers.encoding import encode
from passes.layers.former_buffers import BUFFERS, former_structure
from passes.layers.plan import LayerPlan, LayerShape, plan_of
from passes.layers.structured import Structured
from passes.layers.surgery import carry_over

L = TypeVar("L", bound="Grouped")
Form = Literal["dense", "blocks"]


class Grouped(Structured):
    """What all grouped layers share: the packed weight, its structure, and the two ways to run it."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    filters: Tensor
    inputs: Tensor
    block_sizes: Tensor
    _rows: Tensor
    _places: Tensor
    FORMER_BUFFERS = BUFFERS
    TABLES = (*FORMER_BUFFERS, "_rows", "_places")

    @classmethod
    def from_dense(cls: type[L], layer: Any, plan: LayerPlan) -> L:
        """Make the grouped twin of a dense or masked layer, with the weights that `plan` keeps.

        The bias is shared, the kept weights are copied. Mode, hooks, ``requires_grad`` and the user's attributes move
        along.
        """
        new = cls()
        new._copy_geometry(layer)
        new._set_structure(plan)
        rows = new.packed_rows(layer.weight.detach())
        new.weight = nn.Parameter(rows if rows.dim() > 1 else rows[:, None], requires_grad=layer.weight.requires_grad)
        new.register_parameter("bias", layer.bias)
        new._follow_weight()
        carry_over(layer, new)
        return new

    def __init__(self) -> None:
        """Make an empty layer, for `from_dense` to fill."""
        super().__init__()
        self.form: Form = "dense"

    def _copy_geometry(self, layer: Any) -> None:
        """Copy the attributes that code asks a dense layer for."""
        raise NotImplementedError

    def _resize(self, inputs: int, filters: int) -> None:
        """Set the attributes that count channels."""
        raise NotImplementedError

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the library's layer with a dense weight ``[filters, inputs, *kernel]``."""
        raise NotImplementedError

    def _padded(self, x: Tensor) -> Tensor:
        """Pad what the library's layer does not pad itself."""
        return x

    def restructured(self: L, plan: LayerPlan, outputs: Tensor | None, inputs: Tensor | None) -> L:
        """Make a layer of fewer channels from this one, with its rows for them.

        Args:
            plan: groups of the remaining channels, in their own numbering.
            outputs: int64, which of this layer's filters remain; None: all.
            inputs: the same for its inputs. What the remaining filters read must be among them.
        """
        new = type(self)()
        device = self.weight.device
        filters = torch.arange(self._dense_shape[0]) if outputs is None else outputs
        channels = torch.arange(self._dense_shape[1]) if inputs is None else inputs
        new._copy_geometry(self)
        new._resize(plan.in_channels, plan.out_channels)
        new._set_structure(plan)
        row_of = torch.empty(self._dense_shape[0] * self._dense_shape[1], dtype=torch.int64, device=device)
        row_of[self._beside_weight(self._rows)] = torch.arange(len(self._rows), device=device)
        rows = new._rows.to(device)
        filter_, channel = rows // plan.in_channels, rows % plan.in_channels
        dense = filters.to(device)[filter_] * self._dense_shape[1] + channels.to(device)[channel]
        new.weight = nn.Parameter(self.weight.detach()[row_of[dense]], requires_grad=self.weight.requires_grad)
        bias = self.bias
        if bias is not None and outputs is not None:
            bias = nn.Parameter(bias.detach()[filters.to(device)], requires_grad=bias.requires_grad)
        new.register_parameter("bias", bias)
        new._follow_weight()
        carry_over(self, new)
        return new

    def _set_structure(self, plan: LayerPlan) -> None:
        if plan.labels is None or plan.keep is None:
            raise InputError(f"a layer that is left alone can't be regrouped: {plan.reason}")
        super()._set_structure(plan)
        filters = torch.argsort(plan.labels, stable=True)
        place, channel = plan.mask()[filters].nonzero().unbind(1)
        self._blocks = tuple(plan.block_sizes)
        self._dense_shape = (plan.out_channels, plan.in_channels, *plan.kernel_size)
        self.filters = filters
        self.inputs = plan.keep.nonzero()[:, 1].clone()  # no view, or files would hold twice as much
        self.block_sizes = torch.tensor(plan.block_sizes, device="cpu")
        # Derived from the three above: the dense row of each packed row, and where each filter lies in P_out.
        self._rows = filters[place] * plan.in_channels + channel
        self._places = torch.argsort(filters)

    def _shape(self) -> LayerShape:
        kind = next(dense.__name__ for dense, grouped in GROUPED.items() if isinstance(self, grouped))
        filters, inputs, *kernel = self._dense_shape
        return kind, inputs, filters, tuple(kernel)

    def _former_structure(self, buffers: dict[str, Tensor]) -> LayerPlan:
        plan = plan_of(self)
        return former_structure(buffers, self._shape(), None if plan is None else plan.requested_ratio)

    def _difference(self, other: LayerPlan) -> str | None:
        mine = self._structure
        pairs = (("filters", mine.labels, other.labels), ("inputs", mine.keep, other.keep))
        for name, own, given in pairs:
            if own is not None and given is not None and not torch.equal(own.cpu(), given):
                return f"{name} differs: the weights belong to a layer that was grouped differently"
        return None

    def note_cut(self, whole: LayerPlan, outputs: Tensor | None, inputs: Tensor | None) -> None:
        """Let the extra state also say what was eliminated: the plan in the dense numbering, and what remains of it."""
        self._code = encode(self._structure, whole, (outputs, inputs))

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self._blocks)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight, ``[C_out, C_in, *kernel]``; of a linear layer ``[C_out, C_in]``."""
        return self._dense_shape

    def packed_rows(self, dense: Tensor) -> Tensor:
        """What `dense`, ``[C_out, C_in, …]``, has for the kept connections, ``[connections, …]``, in `weight`'s order.

        The inverse of `dense_weight`.
        """
        return dense.flatten(0, 1).index_select(0, self._rows.to(dense.device))

    def group_blocks(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Filters, inputs, and weight ``[filters, inputs, *kernel]`` of each group; a view of `weight`."""
        blocks, start = [], 0
        filters = torch.split(self._beside_weight(self.filters), [own for own, _ in self._blocks])
        inputs = torch.split(self._beside_weight(self.inputs), [read for _, read in self._blocks])
        for own, read in zip(filters, inputs, strict=True):
            rows = self.weight[start : start + len(own) * len(read)]  # torch.fx can trace it
            start += len(own) * len(read)
            blocks.append((own, read, rows.view(len(own), len(read), *self._dense_shape[2:])))
        return blocks

    def dense_weight(self) -> Tensor:
        """The dense layer's weight with 0 where a connection is pruned, ``[C_out, C_in, *kernel]``."""
        filters, inputs, *kernel = self._dense_shape
        rows = self.weight if kernel else self.weight[:, 0]
        at = self._beside_weight(self._rows)
        return rows.new_zeros(filters * inputs, *kernel).index_copy(0, at, rows).view(self._dense_shape)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer in its present `form`; shapes are those of the dense layer."""
        if self.form == "dense":
            y = self.with_weight(input, self.dense_weight())
            # torchao folds a norm into the convolution right before it, whose weight must be a parameter for that.
            return torch.ops.aten.alias(y) if torch.compiler.is_exporting() else y
        return self._forward_blocks(self._padded(input))

    def with_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """Compute the layer with a dense weight, ``[C_out, C_in, *kernel]``, in place of its own."""
        return self._call(self._padded(input), weight, self.bias)

    def _forward_blocks(self, x: Tensor) -> Tensor:
        dims = self._spatial_dims
        parts = [(len(filters), read, weight, None) for filters, read, weight in self.group_blocks()]
        y = in_blocks(self._call, x, parts, self._beside_weight(self._places), dims)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(-1, *[1] * dims)

    @property
    def _spatial_dims(self) -> int:
        return len(self._dense_shape) - 2

    def extra_repr(self) -> str:
        """What `print` shows of the layer."""
        filters, inputs = self._dense_shape[:2]
        return f"{inputs}, {filters}, groups={self.num_groups}, connections={len(self.weight)}, form={self.form!r}"


class _GroupedConv(Grouped):
    _pad: tuple[int, ...]

    def _copy_geometry(self, layer: Any) -> None:
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        self.kernel_size, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = layer.padding, layer.dilation
        self.padding_mode = layer.padding_mode
        self._pad = layer._pad if isinstance(layer, _GroupedConv) else tuple(layer._reversed_padding_repeated_twice)

    def _resize(self, inputs: int, filters: int) -> None:
        self.in_channels, self.out_channels = inputs, filters

    def _padded(self, x: Tensor) -> Tensor:
        return x if self.padding_mode == "zeros" else F.pad(x, self._pad, mode=self.padding_mode)

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self._spatial_dims - 1]
        padding = self.padding if self.padding_mode == "zeros" else 0
        return convolve(x, weight, bias, self.stride, padding, self.dilation, 1)  # quantizers want all arguments


class GroupedConv1d(_GroupedConv):
    """A regrouped `Conv1d`: ``[N, C_in, L]`` to ``[N, C_out, L′]``."""


class GroupedConv2d(_GroupedConv):
    """A regrouped `Conv2d`: ``[N, C_in, H, W]`` to ``[N, C_out, H′, W′]``."""


class GroupedConv3d(_GroupedConv):
    """A regrouped `Conv3d`: ``[N, C_in, D, H, W]`` to ``[N, C_out, D′, H′, W′]``."""


class GroupedLinear(Grouped):
    """A regrouped `Linear`: ``[…, C_in]`` to ``[…, C_out]``."""

    def _copy_geometry(self, layer: Any) -> None:
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def _resize(self, inputs: int, filters: int) -> None:
        self.in_features, self.out_features = inputs, filters

    def _call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


GROUPED: dict[type[nn.Module], type[Grouped]] = {
    nn.Conv1d: GroupedConv1d,
    nn.Conv2d: GroupedConv2d,
    nn.Conv3d: GroupedConv3d,
    nn.Linear: GroupedLinear,
}
