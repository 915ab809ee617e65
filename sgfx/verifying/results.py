"""What `sgfx.verify` returns: errors as plain data, and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerError:
    """One layer: how far its output is from the masked layer's, and its weights from the dense model's.

    Attributes:
        path: module path.
        kind: the dense layer's class.
        eval_error, train_error: largest difference of its outputs in that mode, relative to the largest output of the
            masked layer; None where neither model calls it. What the layers before it do wrong counts too.
        moved: ‖now − then‖ / ‖then‖ over the weights that are kept.
    """

    path: str
    kind: str
    eval_error: float | None
    train_error: float | None
    moved: float


@dataclass(frozen=True)
class Verification:
    """What `sgfx.verify` returns: print it, or take plain data from `to_dict`.

    An error is the largest absolute difference over the largest absolute value of the reference: about 1e-7 is rounding
    in fp32, 1e-15 in fp64. It is infinite where the two have different shapes, or not the same NaNs, or differ in what
    is no number. Outputs are taken apart down to their tensors, in tuples, lists, dicts and dataclasses.

    Attributes:
        eval_error, train_error: of the model's outputs, in that mode.
        gradient_error: of the gradients in train mode, relative to the largest of all gradients; None where the
            outputs have no gradients.
        moved: ‖now − then‖ / ‖then‖ over all kept parameters: how far training has taken them from `dense`.
        layers: one entry for each layer with a plan, in the order of ``named_modules()``.
    """

    eval_error: float
    train_error: float
    gradient_error: float | None
    moved: float
    layers: tuple[LayerError, ...]

    @property
    def max_error(self) -> float:
        """The largest error of the outputs of the model and of any layer, in eval and in train mode."""
        errors = [error for layer in self.layers for error in (layer.eval_error, layer.train_error)]
        return max(self.eval_error, self.train_error, *(error for error in errors if error is not None))

    def to_dict(self) -> dict[str, Any]:
        """The verification as plain data: dicts, lists, numbers and strings."""
        return {"max_error": self.max_error, **asdict(self)}

    def __str__(self) -> str:
        """The numbers, and a table of the layers that differ."""
        from tabulate import tabulate

        gradients = "none" if self.gradient_error is None else f"{self.gradient_error:.1e}"
        text = (
            f"largest error {self.max_error:.1e}: outputs {self.eval_error:.1e} in eval mode, {self.train_error:.1e} "
            f"in train mode; gradients {gradients}; weights moved by {100 * self.moved:.2f}% since they were dense"
        )
        different = [layer for layer in self.layers if layer.eval_error or layer.train_error]
        if not different:
            return f"{text}\nall {len(self.layers)} layers agree exactly"
        rows = [
            [layer.path, layer.kind, _number(layer.eval_error), _number(layer.train_error), f"{100 * layer.moved:.2f}%"]
            for layer in different
        ]
        table = tabulate(rows, ["layer", "kind", "eval", "train", "moved"], disable_numparse=True)
        return f"{text}\n{len(different)} of {len(self.layers)} layers differ:\n{table}"


def _number(error: float | None) -> str:
    return "not called" if error is None else f"{error:.1e}"
