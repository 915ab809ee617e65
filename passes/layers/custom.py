"""Custom layers: subclasses of torch's layers with code of their own around one convolution or linear call.

Padding as TensorFlow does, a norm and an activation inside, an adapter beside it. Their masked and grouped forms keep
that code: they have all attributes, submodules and other parameters of the user's layer, under their names, and run the
forward of its class on a throw-away twin that has the masked or scattered dense weight in the place of ``weight``. So
they compute what the user's layer computes with that weight, whatever way its code takes. In the form ``"blocks"`` the
one call that is given the weight is computed block by block.

For the compiler the call is a plain layer (`plain_layer`), and what is around it is part of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from passes.layers.attached import all_attached
from passes.layers.grouped import GROUPED, Grouped, GroupedConv1d, GroupedConv2d, GroupedConv3d, GroupedLinear
from passes.layers.known.layer_call import CallsWith, LayerCall
from passes.layers.masked import MASKED, Masked, MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear
from passes.layers.surgery import shallow_copy

M = TypeVar("M", bound="MaskedCustom")

# What a class may define without being more than a layer; all else that torch's classes have is theirs to define.
_OWN_CODE = {"__init__", "__module__", "__doc__", "__annotations__", "__dict__", "__weakref__", "__qualname__",
             "__firstlineno__", "__static_attributes__", "__constants__", "__abstractmethods__", "_abc_impl",
             "__parameters__", "__orig_bases__", "__class_getitem__", "__init_subclass__", "__annotate__",
             "__annotations_cache__", "__annotate_func__", "forward", "_conv_forward", "extra_repr", "__repr__",
             "reset_parameters"}  # fmt: skip


def is_custom(module: nn.Module) -> bool:
    """Whether a module is a dense layer of a user's class that is made from one of torch's layers."""
    known = isinstance(module, tuple(GROUPED)) and type(module) not in GROUPED
    return known and not isinstance(module, Masked) and not type(module).__module__.startswith("torch.")


def change_of_layer(layer: nn.Module) -> str | None:
    """Say what the class of a custom layer changes beside adding code around the call, or None if nothing.

    What is refused here can't be kept by a module of another class: state dicts of its own, and other methods of
    `nn.Module` that do something else.
    """
    name = type(layer).__name__
    for kind in type(layer).__mro__:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "typing", "abc"):
            continue
        changed = next((key for key in vars(kind) if key not in _OWN_CODE and hasattr(nn.Conv2d, key)), None)
        if changed is not None:
            return f"its class ({name}) has its own {changed!r}"
    names = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
    ours = _OURS | ({*dir(GroupedCustomConv2d), *dir(MaskedCustomConv2d)} - {*dir(nn.Conv2d)})
    if clash := sorted(names & ours):
        return f"its {clash[0]!r} has a name that regrouped layers use themselves"
    return None


def plain_layer(layer: nn.Module, call: LayerCall) -> nn.Module:
    """The layer that computes `call` inside `layer`, a custom layer or its grouped form: of torch's class, or grouped.

    It shares the weight and all else that is registered with `layer`, and has the bias of the call: what the user's
    code reads beside the call is found under its path. Plans and cuts come along.
    """
    if isinstance(layer, GroupedCustom):
        return layer.plain(call)
    weight: Any = layer.weight
    outputs, inputs, *kernel = weight.shape
    shape = (inputs * call.groups, outputs, tuple(kernel)) if kernel else (inputs, outputs)
    groups = {"groups": call.groups} if kernel else {}
    kind: Any = call.kind
    new: nn.Module = kind(*shape, bias=call.bias is not None, device="meta", **call.geometry, **groups)
    new._parameters = layer._parameters | {"bias": call.bias}
    new._buffers, new._modules = layer._buffers.copy(), layer._modules.copy()
    new.__dict__.update(all_attached(layer))
    new.training = layer.training
    return new


class Custom(nn.Module):
    """What the masked and the grouped form of a custom layer share: the user's class, and a way to run its code."""

    _kind: type[nn.Module]

    def present_weight(self) -> Tensor:
        """The dense weight that the layer computes with, ``[C_out, C_in, *kernel]``."""
        raise NotImplementedError

    def as_dense(self, weight: Tensor) -> nn.Module:
        """The user's layer anew, with this dense weight and all else that this module has."""
        return shallow_copy(self._twin(weight), self._kind)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's own forward."""
        return self._run(self.present_weight(), args, kwargs)

    def _run(self, weight: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        twin = self._twin(weight)
        output = self._kind.forward(twin, *args, **kwargs)
        for key, value in twin.__dict__.items():  # what the forward set on the layer
            if key != "_parameters" and self.__dict__.get(key, self) is not value:
                self.__dict__[key] = value
        return output

    def _twin(self, weight: Tensor) -> nn.Module:
        """The user's layer with this weight, sharing the registries of buffers, submodules and hooks."""
        new = self._kind.__new__(self._kind)
        replica = self.__dict__.get("_former_parameters", {})  # where DataParallel keeps the parameters of its copies
        left_out = (*_OURS, *replica)
        new.__dict__.update({key: value for key, value in self.__dict__.items() if key not in left_out})
        new._parameters = self._parameters | replica | {"weight": weight}
        return new

    def __getattr__(self, name: str) -> Any:
        """Find what the user's class defines, such as methods and properties, on the user's layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("_kind")
            if kind is None or not hasattr(kind, name):
                raise
        return getattr(self.as_dense(self.present_weight()), name)


# What masked and grouped layers keep beside the user's own.
_OURS = {*Grouped.TABLES, *Masked.TABLES, "_structure", "_code", "_kind", "form", "_blocks", "_dense_shape"}
_OURS |= {"_spatial_dims", "_pad"}


class MaskedCustom(Custom, Masked):
    """The masked form of a custom layer."""

    @classmethod
    def from_dense(cls: type[M], layer: nn.Module) -> M:
        """Make the masked twin of a custom layer, sharing its parameters, with nothing masked yet."""
        new = super().from_dense(layer)
        new._kind = type(layer)
        return new

    def present_weight(self) -> Tensor:
        """The masked weight."""
        return self.masked_weight()


class GroupedCustom(Custom, Grouped):
    """The grouped form of a custom layer."""

    def _copy_geometry(self, layer: Any) -> None:
        self._kind = layer._kind if isinstance(layer, Custom) else type(layer)
        left_out = {*nn.Module().__dict__, *_OURS}
        self.__dict__.update({key: value for key, value in layer.__dict__.items() if key not in left_out})
        self._parameters = layer._parameters.copy()  # others take their places among the user's own
        self._modules = layer._modules.copy()
        self._buffers = layer._buffers.copy()
        self._non_persistent_buffers_set = layer._non_persistent_buffers_set.copy()

    def present_weight(self) -> Tensor:
        """The scattered dense weight."""
        return self.dense_weight()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's own forward; the call that is given the weight is computed in the present `form`."""
        weight = self.present_weight()
        if self.form == "dense":
            return self._run(weight, args, kwargs)
        with CallsWith(weight, self._in_blocks):
            return self._run(weight, args, kwargs)

    def _in_blocks(self, call: LayerCall) -> Tensor:
        return self.plain(call)._forward_blocks(call.input)

    def plain(self, call: LayerCall) -> Grouped:
        """The plain grouped layer that computes `call`: it shares the weight, and has the bias of the call."""
        dense, kind = next((dense, grouped) for dense, grouped in GROUPED.items() if isinstance(self, grouped))
        new: Any = shallow_copy(self, kind)
        new._parameters = self._parameters | {"bias": call.bias}
        new.__dict__.update(replace(call, kind=dense).geometry)
        if dense is not nn.Linear:
            new.padding_mode, new._pad = "zeros", ()
        return new  # type: ignore[no-any-return]


class GroupedCustomConv1d(GroupedCustom, GroupedConv1d):
    """The grouped form of a user's `Conv1d`."""


class GroupedCustomConv2d(GroupedCustom, GroupedConv2d):
    """The grouped form of a user's `Conv2d`."""


class GroupedCustomConv3d(GroupedCustom, GroupedConv3d):
    """The grouped form of a user's `Conv3d`."""


class GroupedCustomLinear(GroupedCustom, GroupedLinear):
    """The grouped form of a user's `Linear`."""


class MaskedCustomConv1d(MaskedCustom, MaskedConv1d):
    """The masked form of a user's `Conv1d`."""


class MaskedCustomConv2d(MaskedCustom, MaskedConv2d):
    """The masked form of a user's `Conv2d`."""


class MaskedCustomConv3d(MaskedCustom, MaskedConv3d):
    """The masked form of a user's `Conv3d`."""


class MaskedCustomLinear(MaskedCustom, MaskedLinear):
    """The masked form of a user's `Linear`."""


_GROUPED: tuple[type[GroupedCustom], ...] = (
    GroupedCustomConv1d, GroupedCustomConv2d, GroupedCustomConv3d, GroupedCustomLinear,
)  # fmt: skip
_MASKED: tuple[type[MaskedCustom], ...] = (
    MaskedCustomConv1d, MaskedCustomConv2d, MaskedCustomConv3d, MaskedCustomLinear,
)  # fmt: skip


def grouped_form(layer: nn.Module) -> type[Grouped]:
    """The class of the grouped form of a dense or masked layer."""
    plain = next(grouped for dense, grouped in GROUPED.items() if isinstance(layer, dense))
    if isinstance(layer, MaskedCustom) or is_custom(layer):
        return next(each for each in _GROUPED if issubclass(each, plain))
    return plain


def dense_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or that of the user's layer that it was made from."""
    return module._kind if isinstance(module, Custom) else type(module)


def masked_form(layer: nn.Module) -> type[Masked]:
    """The class of the masked form of a dense layer."""
    plain = next(masked for dense, masked in MASKED.items() if isinstance(layer, dense))
    return next(each for each in _MASKED if issubclass(each, plain)) if is_custom(layer) else plain
