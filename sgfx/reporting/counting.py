"""Counting multiply-adds: those of convolutions and matrix products; one multiply-add is one.

fvcore counts a model with its grouped layers in the "blocks" form, so what is counted is what is computed. A model that
fvcore can't trace is counted by torch's flop counter, halved, and a report says so. Both count by the same formulas
(`operation_macs.py`), so that a network has one number however it is written. The layers of a frozen model are counted
from their plans: what they keep, at every position of what they give, however they are run.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from passes.errors import InputError, let_memory_errors_pass
from passes.freezing import chosen_layers, chosen_macs
from passes.infra import preserved_random_state
from passes.layers import Grouped
from passes.models import copy_inputs, shapes_of, unhooked_copy
from passes.options import call_model
from sgfx.reporting.operation_macs import fvcore_handles, torch_formulas

LONGEST = 120  # characters of an error that is told of


def count_macs(model: nn.Module, inputs: tuple[object, ...]) -> Counter[str]:
    """Multiply-adds of convolutions and matrix products by module path, each with what is below it; "" is the total.

    Neither the model nor the inputs are worked on: a copy without hooks is run, in eval mode, on copies of them.
    """
    return count_and_tell(model, inputs)[0]


def count_and_tell(model: nn.Module, inputs: tuple[object, ...]) -> tuple[Counter[str], str]:
    """The same, and why fvcore could not count them, in one line; "" if it did, or was not asked."""
    twin, inputs = unhooked_copy(model).eval(), copy_inputs(inputs)
    for module in twin.modules():
        if isinstance(module, Grouped):
            module.form = "blocks"
    with preserved_random_state(), torch.no_grad(), _whole_attention(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\..* is deprecated")  # fvcore is built on it
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # sizes are tensors while it traces
        if layers := chosen_layers(twin):
            return _counted_from_plans(twin, layers, inputs), ""
        try:
            return _counted_by_fvcore(twin, inputs), ""
        except Exception as error:  # torch.jit.trace runs code of others
            let_memory_errors_pass(error)
            return _counted_by_torch(twin, inputs), _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Let torch's transformer layers call the operations that they consist of: fused, they hide them in eval mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _counted_by_fvcore(model: nn.Module, inputs: tuple[object, ...]) -> Counter[str]:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.clear_op_handles().set_op_handle(**fvcore_handles())  # it has some of its own, for norms and pooling too
    return Counter({path: int(macs) for path, macs in analysis.by_module().items()})


def _counted_from_plans(model: nn.Module, layers: Mapping[str, Any], inputs: tuple[object, ...]) -> Counter[str]:
    own: Counter[str] = Counter(dict.fromkeys(layers, 0))

    def note(path: str, module: nn.Module, _: object, output: Tensor) -> None:
        own[path] += chosen_macs(module, output)

    for path, layer in layers.items():
        layer.register_forward_hook(partial(note, path))
    counts, by_layer = _counted_by_torch(model, inputs), Counter[str]()
    for path, macs in own.items():
        more, above = macs - counts.pop(path, 0), path
        while above:  # the torch counter knows dense weights, and nothing of the kernel
            above = above.rpartition(".")[0]
            counts[above] += more
        by_layer[layers[path].path.partition("#")[0]] += macs
    counts.update({path: macs - counts[path] for path, macs in by_layer.items()})
    return counts


def _counted_by_torch(model: nn.Module, inputs: tuple[object, ...]) -> Counter[str]:
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False, custom_mapping=torch_formulas()) as counter:
            call_model(model, inputs)
    except Exception as error:
        let_memory_errors_pass(error)
        raise InputError(
            f"example_inputs of shape {shapes_of(inputs)} do not fit {type(model).__name__}: {error}"
        ) from error
    root = type(model).__name__
    counts = {path.removeprefix(root).removeprefix("."): ops for path, ops in counter.get_flop_counts().items()}
    counts[""] = counts.pop("Global", counts.get("", {}))
    return Counter({path: sum(ops.values()) // 2 for path, ops in counts.items()})
