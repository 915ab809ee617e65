"""Cuts: which channels of a module remain after elimination, riding on the module, and the smaller modules.

A layer plan speaks of the dense layer; a cut says which of its filters and inputs are still there, in its numbering.
Norms have cuts too: their channels are the `outputs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.layers.attached import Attached
from passes.layers.custom import GroupedCustom, is_custom
from passes.layers.grouped import GROUPED, Grouped
from passes.layers.known.as_torch_made_it import is_as_torch_made_it
from passes.layers.known.geometry import conv_groups, is_linear, spatial_dims
from passes.layers.known.norms import is_frozen_norm, is_norm
from passes.layers.plan import LayerPlan, plan_of
from passes.layers.surgery import replace_module, shallow_copy


@dataclass(frozen=True, eq=False)
class Cut:
    """What remains of a module's channels.

    Attributes:
        outputs: int64, ascending: the filters (or a norm's channels) that remain, in the dense numbering; None: all.
        inputs: the same for the inputs; None: all, or a norm.
    """

    outputs: Tensor | None = None
    inputs: Tensor | None = None


_CUT = Attached("cut", Cut)


def cut_of(module: nn.Module) -> Cut:
    """Return the cut of a module; nothing is cut where there is none."""
    return _CUT.of(module) or Cut()


def has_cut(module: nn.Module) -> bool:
    """Whether channels of a module were cut."""
    return _CUT.of(module) is not None


def cuts(model: nn.Module) -> dict[str, Cut]:
    """Return the cuts of all modules that have one, keyed by module path."""
    return _CUT.all_in(model)


def apply_cuts(model: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Put smaller modules in place of those that `cuts` names, in the numbering of what is there now."""
    made = {path: smaller(model.get_submodule(path), cut) for path, cut in cuts.items()}
    for path, module in made.items():  # only now that all of them exist: nothing is left half done
        replace_module(model, path, module)


def is_cuttable(module: nn.Module) -> bool:
    """Whether a module is a layer or norm whose channels can be cut, going by its class."""
    if isinstance(module, _ConvNd) and module.groups > 1:
        return is_depthwise(module) and is_as_torch_made_it(module)
    layer = type(module) in (*GROUPED, *GROUPED.values()) and is_as_torch_made_it(module)
    return layer or is_norm(module)


def may_be_cut(module: nn.Module) -> bool:
    """Whether a module of a model can be cut where graphs show how: one of these, or a custom layer like them."""
    if isinstance(module, GroupedCustom):
        return True
    return is_cuttable(module) or (is_custom(module) and (conv_groups(module) == 1 or is_depthwise(module)))


def channel_counts(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer or norm, as its attributes count them."""
    layer: Any = module
    if is_norm(module):
        count = len(layer.running_mean) if is_frozen_norm(module) else layer.num_features
        return count, count
    if is_linear(module):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def channel_dim(module: nn.Module, dims: int) -> int:
    """The dimension along which the channels of a layer's or norm's output lie, which has `dims` of them."""
    if is_norm(module):
        return 1
    return dims - 1 - spatial_dims(module)


def works_on_filters(norm: nn.Module, layer: nn.Module, dims: int) -> bool:
    """Whether a norm scales the filters of the layer before it, whose output has `dims` dimensions.

    A linear layer's filters lie in the last one, a convolution's without a batch in the first; a norm works on the
    second. torchvision's frozen norm takes batches of pictures alone.
    """
    return channel_dim(layer, dims) == channel_dim(norm, dims) and (dims == 4 or not is_frozen_norm(norm))


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution in which every output channel reads the input channel of the same number."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels > 1


def present_plan(layer: nn.Module) -> LayerPlan:
    """The plan of a grouped layer in the numbering of the channels that remain."""
    plan, cut = plan_of(layer), cut_of(layer)
    if plan is None:
        raise InputError(f"{type(layer).__name__} has no plan")
    return restricted(plan, cut)


def restricted(plan: LayerPlan, cut: Cut) -> LayerPlan:
    """A plan of the remaining channels alone; groups without filters are gone."""
    if plan.labels is None or plan.keep is None:
        raise InputError(f"a layer that is left alone has no groups: {plan.reason}")
    labels = plan.labels if cut.outputs is None else plan.labels[cut.outputs]
    groups, labels = torch.unique(labels, return_inverse=True)
    keep = plan.keep[groups] if cut.inputs is None else plan.keep[groups][:, cut.inputs]
    return LayerPlan(
        plan.kind, keep.shape[1], len(labels), plan.kernel_size, labels, keep, requested_ratio=plan.requested_ratio
    )


def smaller(module: nn.Module, cut: Cut) -> nn.Module:
    """The module with the channels of `cut` alone (in its present numbering), as a new one; the plan moves along."""
    if isinstance(module, Grouped):
        new: Any = module.restructured(restricted(present_plan(module), cut), cut.outputs, cut.inputs)
    else:
        new = shallow_copy(module, type(module))
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in (
            tensors if is_norm(module) else [(name, getattr(module, name)) for name in ("weight", "bias")]
        ):
            if tensor is not None and tensor.dim():  # all but num_batches_tracked
                _replace(new, name, _selected(tensor, cut, is_depthwise(module)))
        for name, index in _counts(module, cut):
            if index is not None:
                setattr(new, name, len(index))
    before = cut_of(module)
    remains = Cut(_composed(before.outputs, cut.outputs), _composed(before.inputs, cut.inputs))
    _CUT.put(new, remains)
    if isinstance(new, Grouped) and (plan := plan_of(new)) is not None:
        new.note_cut(plan, remains.outputs, remains.inputs)
    return new  # type: ignore[no-any-return]


def _selected(tensor: Tensor, cut: Cut, depthwise: bool) -> Tensor:
    with torch.no_grad():
        if cut.outputs is not None:
            tensor = tensor.index_select(0, cut.outputs.to(tensor.device))
        if cut.inputs is not None and tensor.dim() > 1 and not depthwise:
            tensor = tensor.index_select(1, cut.inputs.to(tensor.device))
    return tensor


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = module._parameters.get(name)
    if old is not None:
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = value


def _counts(module: nn.Module, cut: Cut) -> list[tuple[str, Tensor | None]]:
    """The attributes that count a dense module's channels."""
    if isinstance(module, nn.Linear):
        return [("out_features", cut.outputs), ("in_features", cut.inputs)]
    if isinstance(module, _BatchNorm):
        return [("num_features", cut.outputs)]
    if is_depthwise(module):
        return [(name, cut.outputs) for name in ("out_channels", "in_channels", "groups")]
    if isinstance(module, _ConvNd):
        return [("out_channels", cut.outputs), ("in_channels", cut.inputs)]
    return []


def _composed(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    if before is None or after is None:
        return after if before is None else before
    return before[after]
