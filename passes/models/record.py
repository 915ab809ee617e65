"""The structure of a compiled model as plain data, fit for JSON, and back.

A record holds what the model's own constructor does not know (plans: labels and the inputs of each group, or the reason
of a layer that was left alone; cuts) and what has to agree with a fresh dense model before anything is put into it: the
class of every module, its hyperparameters, and which names stand for one and the same tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from passes.errors import InputError
from passes.layers.channel_cut import Cut, channel_counts, cuts, has_cut, is_depthwise, may_be_cut
from passes.layers.custom import GroupedCustom, change_of_layer, dense_class, is_custom
from passes.layers.grouped import GROUPED, Grouped
from passes.layers.known.geometry import conv_groups
from passes.layers.plan import LayerPlan, layer_shape, plan_of, plans
from passes.models.hyperparameters import Hyperparameters

Record: TypeAlias = dict[str, Any]

# What layers and norms count channels by is seen in the shapes of their tensors, and changes with a cut; the last one
# follows from the padding.
_SEEN_ELSEWHERE = {"in_channels", "out_channels", "in_features", "out_features", "num_features"}
_SEEN_ELSEWHERE |= {"_reversed_padding_repeated_twice"}


def describe(model: nn.Module) -> Record:
    """The structure of `model` as dicts, lists, strings and numbers.

    A grouped layer is described as the dense layer it was made from, so that the description of a compiled model and
    that of its dense twin differ in ``"plans"`` and ``"cuts"`` alone (and in the groups of cut depthwise layers).
    """
    found = Hyperparameters(model)
    return {
        "model": type(model).__qualname__,
        "modules": {path: _module_record(m, found) for path, m in model.named_modules(remove_duplicate=False)},
        "plans": {path: plan_record(plan) for path, plan in plans(model).items()},
        "cuts": {path: cut_record(cut) for path, cut in cuts(model).items()},
        "ties": ties(model),
        "transient": sorted(transient(model)),
    }


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, each tensor once."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def ties(model: nn.Module) -> dict[str, str]:
    """Names that stand for a tensor which has another name before: that name."""
    first: dict[int, str] = {}
    tied = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        earlier = first.setdefault(id(tensor), name)
        if earlier != name:
            tied[name] = earlier
    return tied


def transient(model: nn.Module) -> set[str]:
    """Names of the buffers that are not persistent, whether they hold a tensor or not."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _module_record(module: nn.Module, found: Hyperparameters) -> Record:
    plan = plan_of(module)
    if isinstance(module, GroupedCustom):
        own = {"class": dense_class(module).__qualname__, **found.of(module.as_dense(module.weight))}
    elif isinstance(module, Grouped) and plan is not None:
        dense = next(kind for kind, grouped in GROUPED.items() if type(module) is grouped)
        own = {"class": plan.kind, **found.of(module, dense)}
        own = {key: value for key, value in own.items() if key not in ("form", *Grouped.TABLES)}
        if plan.kernel_size:
            own |= {"groups": 1, "transposed": False, "output_padding": [0] * len(plan.kernel_size)}
    else:
        own = {"class": type(module).__qualname__, **found.of(module)}
    left_out = _SEEN_ELSEWHERE if isinstance(module, Grouped | _ConvNd | nn.Linear | _NormBase) else set()
    left_out = left_out | {"groups"} if has_cut(module) and is_depthwise(module) else left_out
    return {key: value for key, value in own.items() if key not in left_out}


def plan_record(plan: LayerPlan) -> Record:
    """A layer plan as plain data; `plan_from_record` is the way back."""
    kind, inputs, filters, kernel = plan.shape
    record = {"kind": kind, "in_channels": inputs, "out_channels": filters, "kernel_size": list(kernel)}
    if plan.labels is None or plan.keep is None:
        return record | {"reason": plan.reason}
    return record | {
        "requested_ratio": plan.requested_ratio,
        "labels": plan.labels.tolist(),
        "inputs": [row.nonzero()[:, 0].tolist() for row in plan.keep],
    }


def plan_from_record(record: Mapping[str, Any], layer: nn.Module) -> LayerPlan:
    """Make the plan of the dense `layer` from its record.

    Raises:
        InputError: the record is of another layer, or no plan.
    """
    kind, inputs, filters, kernel = layer_shape(layer)
    given = record["kind"], record["in_channels"], record["out_channels"], tuple(record["kernel_size"])
    if given != (kind, inputs, filters, kernel):
        raise InputError(f"it is {_shape(*given)} in the file and {_shape(kind, inputs, filters, kernel)} in the model")
    if "reason" in record:
        if not isinstance(record["reason"], str):
            raise InputError("its reason is no text")
        return LayerPlan.of(layer, reason=record["reason"])
    check_regroupable(layer)
    check_sizes(record)
    labels, reads = record["labels"], record["inputs"]
    if not all(type(label) is int and 0 <= label < len(reads) for label in labels):
        raise InputError(f"its labels are not integers from 0 to {len(reads) - 1}")
    if not any(reads) or not all(_is_ascending(each, inputs) for each in reads):
        raise InputError(f"the inputs of its groups are not ascending numbers below {inputs}")
    if not isinstance(record["requested_ratio"], int | float) or not 0 <= record["requested_ratio"] < 1:
        raise InputError(f"its requested_ratio must be a number in [0, 1), not {record['requested_ratio']!r:.40}")
    keep = torch.zeros(len(reads), inputs, dtype=torch.bool)
    for row, each in zip(keep, reads, strict=True):
        row[each] = True
    ratio = float(record["requested_ratio"])
    return LayerPlan.of(layer, labels=torch.tensor(labels), keep=keep, requested_ratio=ratio)


def check_sizes(record: Mapping[str, Any]) -> None:
    """Refuse a plan's record with more groups than filters, or not a label for each, before anything is made of it."""
    if "reason" in record:
        return
    filters, labels, reads = record["out_channels"], record["labels"], record["inputs"]
    if type(filters) is not int or not 0 < len(labels) == filters:
        raise InputError(f"it has {len(labels)} labels for {filters!r:.40} filters")
    if not 0 < len(reads) <= filters:
        raise InputError(f"it has {len(reads)} groups of {filters} filters")


def check_regroupable(layer: nn.Module) -> None:
    """Raise an InputError where a dense layer is none of those that can be regrouped."""
    known = type(layer) in GROUPED or (is_custom(layer) and change_of_layer(layer) is None)
    if not known or conv_groups(layer) != 1:
        raise InputError(f"a {type(layer).__name__} can't be regrouped")


def cut_record(cut: Cut) -> Record:
    """A cut as plain data; `cut_from_record` is the way back."""
    sides = {"outputs": cut.outputs, "inputs": cut.inputs}
    return {side: None if index is None else index.tolist() for side, index in sides.items()}


def cut_from_record(record: Mapping[str, Any], module: nn.Module) -> Cut:
    """Make the cut of a dense or grouped `module` that nothing was cut from yet.

    Raises:
        InputError: the record is of another module, or no cut.
    """
    if not may_be_cut(module):
        raise InputError(f"channels of a {type(module).__name__} can't be cut")
    sides = {}
    for side, count in zip(("outputs", "inputs"), channel_counts(module), strict=True):
        index = record[side]
        if index is not None and not (index and _is_ascending(index, count)):
            raise InputError(f"its {side} that remain are not ascending numbers below {count}")
        sides[side] = None if index is None else torch.tensor(index, dtype=torch.int64)
    return Cut(**sides)


def _is_ascending(numbers: list[int], end: int) -> bool:
    return all(type(n) is int for n in numbers) and all(
        a < b for a, b in zip([-1, *numbers], [*numbers, end], strict=True)
    )


def _shape(kind: str, inputs: int, filters: int, kernel: tuple[int, ...]) -> str:
    size = f", kernel {'×'.join(map(str, kernel))}" if kernel else ""
    return f"{kind}({inputs}, {filters}{size})"
