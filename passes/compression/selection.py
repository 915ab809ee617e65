"""Selection: which layers will be regrouped, with what groups and ratio, and why the others are left alone.

A layer stays as it is, with the first of these reasons that holds:
 1. it is matched by `ignore`;
 2. it lies inside a module that reads its parameters itself (`nn.MultiheadAttention`);
 3. it is masked by a `Pruner`, parametrized or transposed;
 4. its type is neither a torch layer class nor a subclass that puts its weight as it is into one call of that kind
    (`tracing.opening`, `tracing.probing`), it was changed (`as_torch_made_it`), or its weight is not a plain
    floating-point parameter of the layer's shape; it is depthwise or already grouped;
 5. a parameter of it is not its own (shared with another module, read by another operation, held elsewhere too), or
    nothing calls it in any mode; or it lies outside every traced region, and no run has shown that its own call alone
    uses its parameters;
 6. it is the first convolution in order of execution, or has fewer than 4 filters or 4 inputs. An exact name in
    `overrides` lifts this rule.

Naming a layer in `overrides` that rules 2 to 5 leave alone is an error. Grouped layers, of a model that was compiled
before, are not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

from passes.errors import InputError
from passes.infra.compilation import Compilation, Fact, Facts, Pass
from passes.layers.custom import is_custom
from passes.layers.grouped import GROUPED, Grouped
from passes.layers.known.as_torch_made_it import change_of
from passes.layers.known.geometry import conv_groups
from passes.layers.masked import Masked
from passes.layers.plain_weights import removal_of
from passes.layers.plan import layer_shape
from passes.options.names import covers, matches
from passes.options.settings import SETTINGS, Settings
from passes.tracing.probing import misuse
from passes.tracing.regions import REGIONS, Regions
from passes.tracing.usage import Usage

MIN_CHANNELS = 4
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Target:
    """What is asked of one layer: at most `groups` groups, and the share `ratio` of its connections pruned."""

    groups: int
    ratio: float


TARGETS = Fact[dict[str, Target]]("targets")  # by module path
REASONS = Fact[dict[str, str]]("reasons")  # why each other layer is left alone, by module path


def obstacle(path: str, layer: nn.Module, usage: Usage) -> str | None:
    """Say why a layer can't be regrouped at all (rules 2 to 5), or None if it can."""
    if not path:
        return "the model is a layer itself: wrap it in nn.Sequential"
    around = usage.called_around(path)
    if (inside := next((each for each in around if each not in usage.regions.leaves), None)) is not None:
        return f"inside {inside!r}, and {usage.called[inside]} reads its parameters itself"
    return _obstacle_of_type(layer) or _obstacle_of_use(path, layer, usage)


def _obstacle_of_type(layer: nn.Module) -> str | None:
    if isinstance(layer, Masked):
        return "already masked by a Pruner: call its lower() instead"
    if is_parametrized(layer):
        return change_of(layer)
    if isinstance(layer, _ConvTransposeNd):
        return "transposed convolution"
    if type(layer) not in GROUPED and not is_custom(layer):
        return f"a subclass of torch's layers ({type(layer).__name__}), which may compute something else"
    if (change := change_of(layer)) is not None:
        return change
    more = set(layer._parameters) != {"weight", "bias"} or layer._buffers or layer._modules
    if more and (removal := removal_of(layer)) is not None:
        return f"its weight is computed by a hook: remove it with {removal}"
    if more and not is_custom(layer):
        return "its weight is computed (weight_norm, spectral_norm, prune), or it holds more than weight and bias"
    weight = layer.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}".replace("torch.", "") + ", not a real floating-point tensor"
    groups = conv_groups(layer)
    if groups == 1 and tuple(weight.shape) != _expected_shape(layer):
        return f"its weight has the shape {tuple(weight.shape)}, and its attributes say {_expected_shape(layer)}"
    if groups > 1:
        return "depthwise convolution" if groups == layer.in_channels else f"already grouped (groups={groups})"
    return None


def _expected_shape(layer: nn.Module) -> tuple[int, ...]:
    _, inputs, filters, kernel = layer_shape(layer)
    return (filters, inputs, *kernel)


def _obstacle_of_use(path: str, layer: nn.Module, usage: Usage) -> str | None:
    own = [(name, parameter) for name, parameter in layer._parameters.items() if name in ("weight", "bias")]
    for name, parameter in own:
        full = f"{path}.{name}"
        if parameter is None:
            continue
        if full in usage.sharers:
            return f"its {name} is shared with {usage.sharers[full]!r}"
        if full in usage.read and (name == "weight" or not is_custom(layer)):  # its own code may, and it stays as it is
            return f"its {name} is read by an operation outside its own call"
        if id(parameter) in usage.listed:
            return f"its {name} is also held outside the registered parameters, by {usage.listed[id(parameter)]!r}"
        if parameter.dtype != layer.weight.dtype:
            return f"its {name} has another dtype than its weight"
    if id(layer) in usage.listed:
        return f"also held outside the registered submodules, by {usage.listed[id(layer)]!r}"
    doubt = usage.doubt(path)
    if not is_custom(layer) or path in usage.opened:
        return doubt
    more = usage.regions.closed.get(path) or doubt or misuse(layer, usage.arguments(path))
    return more if more == doubt else f"a subclass of torch's layers ({type(layer).__name__}), and {more}"


def _small(layer: nn.Module) -> str | None:
    _, inputs, filters, _ = layer_shape(layer)
    if filters < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} filters ({filters})"
    if inputs < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} inputs ({inputs})"
    return None


def _exempt(path: str, layer: nn.Module, usage: Usage) -> str | None:
    """Rule 6: why a layer is left alone unless it is named."""
    return "first convolution" if path in usage.first_convolutions else _small(layer)


def select(model: nn.Module, regions: Regions, settings: Settings) -> tuple[dict[str, Target], dict[str, str]]:
    """Decide about every layer of `model`: what is asked of it, or the reason why it is left alone.

    Raises:
        InputError: an override names a layer that can't be regrouped, or there is nothing left to compress.
    """
    usage = Usage(model, regions)
    targets, reasons = {}, {}
    for path, layer in model.named_modules():
        if not isinstance(layer, _ConvNd | nn.Linear):
            continue
        named = path in settings.overrides
        reason = obstacle(path, layer, usage)
        if reason is not None and named:
            raise InputError(f"overrides names layer {path!r}, which can't be regrouped: {reason}")
        if any(covers(entry, path) for entry in settings.ignore):
            reason = "ignored"
        elif reason is None and not named:
            reason = _exempt(path, layer, usage)
        if reason is None:
            targets[path] = target_of(path, layer, settings)
        else:
            reasons[path] = reason
    if not targets:
        raise InputError(f"{type(model).__name__} has nothing to compress" + _because(model, reasons))
    return targets, reasons


def target_of(path: str, layer: nn.Module, settings: Settings) -> Target:
    """What the settings ask of a layer: its overrides', else what holds for all."""
    ratio = settings.ratio
    if isinstance(layer, nn.Linear) and settings.linear_ratio is not None:
        ratio = settings.linear_ratio
    asked: dict[str, float] = {"groups": settings.groups, "ratio": ratio}
    patterns = [values for entry, values in settings.overrides.items() if entry != path and matches(entry, path)]
    for values in [*patterns, settings.overrides.get(path, {})]:  # later patterns win, and an exact name over them
        asked.update(values)
    filters = layer_shape(layer)[2]
    return Target(min(int(asked["groups"]), filters), float(asked["ratio"]))


def _because(model: nn.Module, reasons: dict[str, str]) -> str:
    if any(isinstance(module, Grouped) for module in model.modules()):
        return ": it was compiled before; compile the dense model anew"
    if not reasons:
        return ": it has no convolutions or linear layers"
    shown = [f"{path!r}: {reason}" if path else reason for path, reason in list(reasons.items())[:5]]
    more = [f"and {len(reasons) - 5} more"] if len(reasons) > 5 else []
    return ": " + "; ".join(shown + more)


class Selection(Pass):
    """Find the targets, and the reasons for everything left alone."""

    name = "selection"
    requires = (SETTINGS, REGIONS)
    ensures = (TARGETS, REASONS)

    def run(self, compilation: Compilation) -> Facts:
        """Decide about every layer."""
        targets, reasons = select(compilation.model, compilation[REGIONS], compilation[SETTINGS])
        return {TARGETS: targets, REASONS: reasons}

    def check(self, compilation: Compilation) -> str | None:
        """Every layer is a target or has a reason, and none is both."""
        layers = {path for path, m in compilation.model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
        targets, reasons = compilation[TARGETS].keys(), compilation[REASONS].keys()
        if targets & reasons or layers != targets | reasons:
            return "some layer is neither a target nor left alone, or both"
        return None
