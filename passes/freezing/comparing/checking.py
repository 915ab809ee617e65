"""Checking: a frozen form is handed out only if it computes what the model's eval form does.

1. Both are run on the example inputs, from one random state; where these hold nothing but one number, on random values
   of the same shapes too. They may differ by rounding, and by what turns on rounding (see `doubt`) as long as every
   layer by itself agrees.
2. Of a model that is frozen in parts, the parts answer for what they are called with: the layers decide.
3. The message names the first layer that differs (see `locating`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.freezing.asking import ORIGINAL
from passes.freezing.choosing.decisions import LayerDecision
from passes.freezing.choosing.forms import FORM
from passes.freezing.comparing.doubt import Expected, Inputs, Record
from passes.freezing.comparing.locating import first_difference
from passes.freezing.parts import filled
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.infra.random_state import seed_all
from passes.models.comparing import difference, kinds
from passes.models.copying import copy_inputs, unhooked_copy
from passes.models.values import Plain, comparable, shapes_of, tensors_in
from passes.options.arguments import call_model
from passes.options.settings import SETTINGS

Outputs = dict[str, Tensor | Plain]
DOUBT = Fact[str]("doubt")  # what is worth knowing about the comparison, or ""


class Comparison(Pass):
    """Compare the form with the model that it was made from.

    Args:
        rewrites: what rewrote its graphs, to find out which layer differs.
    """

    name = "comparison"
    requires = (SETTINGS, ORIGINAL, FORM)
    ensures = (DOUBT,)

    def __init__(self, rewrites: Sequence[Pass]) -> None:
        """Take the list."""
        self._rewrites = rewrites

    def run(self, compilation: Compilation) -> Facts:
        """Run both."""
        form, inputs = compilation[FORM], compilation[SETTINGS].example_inputs or ()
        return {DOUBT: compared(form.model, compilation[ORIGINAL], form.layers, inputs, self._rewrites)}


def compared(
    frozen: nn.Module, model: nn.Module, layers: Mapping[str, LayerDecision], inputs: Inputs, rewrites: Sequence[Pass]
) -> str:
    """Compare a frozen form with the model that it was made from, in eval mode.

    Args:
        frozen: the form.
        model: the model; a copy of it is run, without its hooks.
        layers: how each layer is run.
        inputs: the example inputs.
        rewrites: what rewrote its graphs, to find out which layer differs.

    Returns:
        What is worth knowing about the comparison, or "".

    Raises:
        InputError: they differ, or the model can't be run.
    """
    plain = unhooked_copy(model).eval()
    for given in _trials(inputs):
        try:
            expected = _outputs(plain, given)
        except InputError:
            raise
        except Exception as error:
            let_memory_errors_pass(error)
            if given is not inputs:  # random values may be none that the model takes
                continue
            raise InputError(
                f"example_inputs of shape {shapes_of(inputs)} do not fit the model in eval mode: {error}"
            ) from error
        found = _outputs_or_error(frozen, given)
        apart = _apart(found, expected)
        if not apart:
            continue
        _refuse_randomness(plain, given, expected)
        layer = first_difference(model, layers, given, rewrites)
        if layer is None and not isinstance(found, str) and _is_doubtful(frozen, found, plain, given):
            return f"{apart}, but every layer by itself agrees: the outputs turn on rounding"
        where = "every layer by itself agrees" if layer is None else f"{layer!r} is the first layer that differs"
        raise InputError(
            f"the frozen form is not handed out, since it computes something else than {type(model).__name__} in eval "
            f"mode: {apart}; {where}. Freeze a part of the model without it"
        )
    return ""


def _trials(inputs: Inputs) -> Iterator[Inputs]:
    """The example inputs, and random ones if they say little."""
    yield inputs
    floats = [x for x in tensors_in(inputs) if x.is_floating_point()]
    if any(x.numel() > 1 and bool((x == x.flatten()[0]).all()) for x in floats):
        yield filled(inputs)


def _outputs(model: nn.Module, inputs: Inputs, seed: int = 0) -> Outputs:
    seed_all(seed)
    with torch.no_grad():
        given = call_model(model, copy_inputs(inputs))
    outputs = comparable(given, "output")
    if not outputs:
        raise InputError("there is nothing to compare a frozen form by: the outputs hold no tensors and no numbers")
    return outputs


def _outputs_or_error(frozen: nn.Module, inputs: Inputs) -> Outputs | str:
    try:
        return _outputs(frozen, inputs)
    except Exception as error:
        let_memory_errors_pass(error)
        return f"it can't be run ({error})"


def _apart(found: Outputs | str, expected: Outputs) -> str:
    """How outputs are apart by more than rounding, in words; "" if they are not."""
    if isinstance(found, str):
        return found
    if found.keys() != expected.keys():
        return f"it gives {', '.join(found)}, and not {', '.join(expected)}"
    for place, wanted in expected.items():
        given = found[place]
        if _kind(given) != _kind(wanted):
            return f"{place} is {_kind(given)}, and not {_kind(wanted)}"
        if isinstance(given, Tensor) and isinstance(wanted, Tensor):
            off = difference(given, wanted)
            if not off.is_rounding:
                return f"{place} differs by {off.worst:.1e}, where the largest value is {off.largest:.1e}"
    return ""


def _kind(leaf: Tensor | Plain) -> object:
    """What must be the same for two leaves to be compared, or all there is to say about one that is no tensor."""
    return kinds([leaf])[0] if isinstance(leaf, Tensor) else leaf


def _refuse_randomness(plain: nn.Module, inputs: Inputs, expected: Outputs) -> None:
    if _apart(_outputs(plain, inputs, seed=1), expected):
        raise InputError(
            f"{type(plain).__name__} gives something else each time in eval mode, so its frozen form can't be compared "
            "with it and is not handed out: turn off what is random, or freeze the parts around it"
        )


def _is_doubtful(frozen: nn.Module, found: Outputs, plain: nn.Module, inputs: Inputs) -> bool:
    """Whether rounding may be why outputs are apart: of a model in parts, or if nudged inputs lead as far."""
    if not isinstance(frozen, fx.GraphModule):
        return True
    expected = Expected(lambda each: _record(_outputs(plain, each)), inputs)
    same = _record(found).keys() == expected.record.keys()
    return expected.unsteady or (same and expected.differing(_record(found)) is None)


def _record(outputs: Outputs) -> Record:
    """Each tensor among outputs, by its place and kind."""
    return {f"{place} {_kind(leaf)}": [leaf] for place, leaf in outputs.items() if isinstance(leaf, Tensor)}
