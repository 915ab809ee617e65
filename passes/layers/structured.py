"""What masked and grouped layers share: a structure, which is no number to train, average or convert.

1. The structure is a layer plan. What a forward needs of it are tables: plain tensors that follow from the plan,
   neither parameters nor buffers, so that averages, `half`, `to_empty` and the like pass them by.
2. Tables follow the weight from device to device. On the meta device, where they would be lost, they never are.
3. A state dict carries the structure as an extra state, made anew for each. A state dict with another structure is
   refused before anything of the layer is copied.
4. Earlier versions kept tables as buffers. Their state dicts and pickles are read.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from passes.errors import InputError
from passes.layers.encoding import as_tensor, decode, encode
from passes.layers.plan import LayerPlan, LayerShape

_KEY = "_extra_state"  # torch's name of it


class Structured(nn.Module):
    """A layer with a structure."""

    weight: Tensor
    _structure: LayerPlan  # in the numbering of the channels that the layer has
    _code: bytes
    TABLES: ClassVar[tuple[str, ...]]  # names of the tables
    FORMER_BUFFERS: ClassVar[tuple[str, ...]]  # what a state dict of an earlier version has for the extra state

    def _shape(self) -> LayerShape:
        """Kind, inputs, filters and kernel of the dense layer of as many channels."""
        raise NotImplementedError

    def _set_structure(self, plan: LayerPlan) -> None:
        """Become a layer of this structure, with the tables for it on the CPU. Parameters stay what they are."""
        self._structure, self._code = plan, encode(plan)

    def _former_structure(self, buffers: dict[str, Tensor]) -> LayerPlan:
        """The structure that buffers of an earlier version stood for; an InputError if they are none."""
        raise NotImplementedError

    def _difference(self, other: LayerPlan) -> str | None:
        """What keeps weights of another structure from being loaded, or None."""
        raise NotImplementedError

    def _beside_weight(self, table: Tensor) -> Tensor:
        """A table on the device of the weight: replicas and functional calls bring weights of other devices."""
        weight: Any = self.weight  # what torch.fx has for it while it traces is no tensor
        return table if not isinstance(weight, Tensor) or weight.device == table.device else table.to(weight.device)

    def _follow_weight(self) -> None:
        if not self.weight.is_meta:
            self.__dict__.update({name: self._beside_weight(getattr(self, name)) for name in self.TABLES})

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move and convert parameters; the tables only follow them."""
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._follow_weight()
        return self

    def get_extra_state(self) -> Tensor:
        """The structure as a new tensor, uint8 ``[numbers]``: whatever is done to it does not reach the layer."""
        return as_tensor(self._code)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse another structure: what a state dict brings was compared before, what hooks put into it was not."""
        if (problem := self._difference(decode(state, self._shape()))) is not None:
            raise InputError(problem)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse weights of another structure: they may have the same shapes and another meaning."""
        errors: list[str] = args[-1]
        key = prefix + _KEY
        try:
            names = [name for name in self.FORMER_BUFFERS if prefix + name in state_dict]
            former = {name: state_dict.pop(prefix + name) for name in names}
            if len(former) == len(self.FORMER_BUFFERS):
                state_dict[key] = as_tensor(encode(self._former_structure(former)))
            if key in state_dict and (problem := self._difference(decode(state_dict[key], self._shape()))) is not None:
                raise InputError(problem)
        except InputError as error:
            errors.append(f"{prefix}{error}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow_weight()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was pickled, by earlier versions too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_structure" not in self.__dict__:
            former: Any = {name: self._buffers.pop(name) for name in self.FORMER_BUFFERS}
            for name in self.TABLES:
                self._buffers.pop(name, None)
                self._non_persistent_buffers_set.discard(name)
            self._set_structure(self._former_structure(former))
            self._follow_weight()
