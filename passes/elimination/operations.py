"""The operations that the channel analysis knows, by kind; what each kind means stands in `rules`."""

from __future__ import annotations

import builtins
import operator

import torch
from torch import nn
from torch.nn import functional as F


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Functions and methods, by the name that `name_of` gives.
ELEMENTWISE = _names(
    """add iadd radd sub isub rsub subtract mul imul rmul multiply div truediv itruediv true_divide divide neg abs exp
    expm1 log log1p sqrt rsqrt pow square reciprocal sin cos erf sign floor ceil round clamp clamp_min clamp_max
    maximum minimum where lerp nan_to_num masked_fill logical_not eq ne gt lt ge le
    sigmoid tanh relu relu6 leaky_relu elu selu celu silu mish gelu softplus softsign hardtanh hardswish hardsigmoid
    threshold dropout alpha_dropout dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout
    stochastic_depth float half double bfloat16 to type type_as clone detach contiguous"""
)
_BEHIND_CHANNELS = 0  # stands for all dimensions behind the channels, however many
LOCAL = {  # along how many of the last dimensions they work, with a batch or without
    **dict.fromkeys(_names("max_pool1d avg_pool1d lp_pool1d adaptive_avg_pool1d adaptive_max_pool1d"), 1),
    **dict.fromkeys(_names("max_pool2d avg_pool2d lp_pool2d adaptive_avg_pool2d adaptive_max_pool2d"), 2),
    **dict.fromkeys(_names("max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d"), 3),
    **dict.fromkeys(_names("interpolate upsample"), _BEHIND_CHANNELS),
}
REDUCTIONS = _names("mean sum amax amin")
ALONG_ONE_DIM = _names("softmax log_softmax softmin cumsum")
JOINING = _names("cat concat concatenate stack")
# Taking a channel out before or after these gives the same: their arguments don't count channels.
RELATIVE = JOINING | _names(
    """flatten permute transpose swapaxes swapdims t movedim moveaxis unsqueeze flip fliplr flipud pad repeat tile
    expand_as"""
)
# These may count channels, by index, by size or by number.
COUNTING = _names("view reshape expand getitem chunk split tensor_split narrow select index_select unbind squeeze roll")
PLAIN_ATTRIBUTES = _names("dtype device ndim requires_grad is_cuda layout")
PLAIN_METHODS = _names("dim ndimension is_floating_point element_size get_device")

# Modules, by their exact class.
ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink,
    nn.Softshrink, nn.Threshold, nn.RReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.Identity,
)  # fmt: skip
LOCAL_MODULES: dict[type[nn.Module], int] = {  # as of `LOCAL`
    **dict.fromkeys((
        nn.MaxPool1d, nn.AvgPool1d, nn.LPPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d, nn.ReflectionPad1d,
        nn.ReplicationPad1d, nn.ZeroPad1d, nn.ConstantPad1d, nn.CircularPad1d,
    ), 1),
    **dict.fromkeys((
        nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ReflectionPad2d,
        nn.ReplicationPad2d, nn.ZeroPad2d, nn.ConstantPad2d, nn.CircularPad2d,
    ), 2),
    **dict.fromkeys((
        nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d, nn.ReflectionPad3d,
        nn.ReplicationPad3d, nn.ZeroPad3d, nn.ConstantPad3d, nn.CircularPad3d,
    ), 3),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), _BEHIND_CHANNELS),
}  # fmt: skip


def dims_along(last: int, rank: int) -> range:
    """The dimensions that a local operation works along, in a tensor of `rank` dimensions; `last` as the tables say."""
    return range(2, rank) if last == _BEHIND_CHANNELS else range(rank - last, rank)


_HOMES = (torch, F, operator, builtins)


def name_of(target: object) -> str:
    """The name under which an operation is known, without the underscores of in-place and special methods.

    A function that only has the name of a known one (a user's own, wrapped for torch.fx) has none: "".
    """
    if isinstance(target, str):
        return target.strip("_")
    name = getattr(target, "__name__", "")
    known = any(getattr(home, name, None) is target for home in _HOMES)
    if not known and not str(getattr(target, "__module__", "")).startswith("torchvision.ops."):
        return ""
    return str(name).strip("_")
