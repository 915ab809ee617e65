"""Ways to call the operations that the channel analysis knows: by name, and modules by class.

An operation takes a tensor `x`, and its shape `s` where it is written for one.
"""

import itertools

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from passes.elimination import operations as channel_ops

ONE = torch.tensor(0.5, dtype=torch.float64)


def words(text):
    return text.split()


def by_name(names):
    """The operation as a function of torch, of torch.nn.functional and as a method, as far as they exist."""
    calls = {}
    for name in names:
        homes = [getattr(home, name) for home in (torch, F) if hasattr(home, name)]
        functions = [lambda x, f=f: f(x) for f in homes]
        calls[name] = [*functions, *([lambda x, n=name: getattr(x, n)()] if hasattr(Tensor, name) else [])]
    return calls


def _iadd(x):
    x += 1
    return x


def _isub(x):
    x -= 1
    return x


def _imul(x):
    x *= 2
    return x


def _itruediv(x):
    x /= 2
    return x


def _dropped(name, x):
    home = torch if name.startswith("feature_d") else F
    return getattr(home, name)(x, 0.0, True)


def _lp(n, x):
    return getattr(F, f"lp_pool{n}d")(x, 2.0, 2, 1)


def _adaptive(kind, n, x, shape):
    return getattr(F, f"adaptive_{kind}_pool{n}d")(x, tuple(shape[-n:]))


def _to_one(kind, n, x):
    return getattr(F, f"adaptive_{kind}_pool{n}d")(x, 1)


UNARY = [
    "neg",
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "sqrt",
    "rsqrt",
    "square",
    "reciprocal",
    "sin",
    "cos",
    "erf",
    "sign",
    "floor",
    "ceil",
    "round",
    "nan_to_num",
    "logical_not",
    "sigmoid",
    "tanh",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "silu",
    "mish",
    "gelu",
    "softplus",
    "softsign",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "float",
    "half",
    "double",
    "bfloat16",
    "clone",
    "detach",
    "contiguous",
]
BINARY = [
    "add",
    "sub",
    "rsub",
    "subtract",
    "mul",
    "multiply",
    "div",
    "true_divide",
    "divide",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "gt",
    "lt",
    "ge",
    "le",
]
DROPPING = [
    "dropout",
    "alpha_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "feature_alpha_dropout",
]
OPERATIONS = {
    **by_name(UNARY),
    **{
        name: [lambda x, n=name: getattr(torch, n)(x, 0.5), lambda x, n=name: getattr(torch, n)(x, x)]
        for name in BINARY
    },
    **{name: [lambda x, n=name: _dropped(n, x)] for name in DROPPING},
    "iadd": [lambda x: _iadd(x.clone())],
    "isub": [lambda x: _isub(x.clone())],
    "imul": [lambda x: _imul(x.clone())],
    "itruediv": [lambda x: _itruediv(x.clone())],
    "radd": [lambda x: 1 + x],
    "rmul": [lambda x: 2 * x],
    "truediv": [lambda x: x / 2, lambda x: x / (1 + x)],
    "pow": [lambda x: x**2, lambda x: torch.pow(x, x), lambda x: 2**x],
    "clamp": [lambda x: x.clamp(0, 1), lambda x: torch.clamp(x, min=0.2)],
    "clamp_min": [lambda x: x.clamp_min(0.5)],
    "clamp_max": [lambda x: x.clamp_max(0.5)],
    "where": [lambda x: torch.where(x > 0.5, x, 0.1 * x), lambda x: torch.where(x > 0.5)],
    "lerp": [lambda x: torch.lerp(x, 2 * x, 0.5), lambda x: x.lerp(x * x, x)],
    "masked_fill": [lambda x: x.masked_fill(x > 0.5, 0.0)],
    "threshold": [lambda x: F.threshold(x, 0.5, 0.0)],
    "stochastic_depth": [lambda x: torchvision.ops.stochastic_depth(x, 0.0, "row", True)],
    "to": [lambda x: x.to(torch.float32), lambda x: x.to(ONE)],
    "type": [lambda x: x.type(torch.float32)],
    "type_as": [lambda x: x.type_as(x)],
    **{f"max_pool{n}d": [lambda x, n=n: getattr(F, f"max_pool{n}d")(x, 3, 1, 1)] for n in (1, 2, 3)},
    **{f"avg_pool{n}d": [lambda x, n=n: getattr(F, f"avg_pool{n}d")(x, 3, 1, 1)] for n in (1, 2, 3)},
    **{f"lp_pool{n}d": [lambda x, n=n: getattr(F, f"lp_pool{n}d")(x, 2, 1), lambda x, n=n: _lp(n, x)] for n in (1, 2)},
    **{
        f"adaptive_{kind}_pool{n}d": [
            lambda x, s, n=n, k=kind: _adaptive(k, n, x, s),
            lambda x, n=n, k=kind: _to_one(k, n, x),
        ]
        for kind, n in itertools.product(("avg", "max"), (1, 2, 3))
    },
    "interpolate": [
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, scale_factor=1.0),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
        lambda x, s: F.interpolate(x, size=s[2:]),
    ],
    "upsample": [lambda x: F.upsample(x, scale_factor=2)],
    **{
        name: [
            lambda x, n=name: getattr(x, n)(1),
            lambda x, n=name: getattr(torch, n)(x, (0, -1), True),
            lambda x, n=name: getattr(x, n)(),
            lambda x, n=name: getattr(x, n)(dim=()),
        ]
        for name in ("mean", "sum", "amax", "amin")
    },
    **{
        name: [lambda x, n=name, d=d: getattr(x, n)(d) for d in (0, 1, -1)]
        for name in ("softmax", "log_softmax", "cumsum")
    },
    "softmin": [lambda x: F.softmin(x, 1), lambda x: F.softmin(x, dim=-1)],
    **{
        name: [lambda x, n=name, d=d: getattr(torch, n)([x, 2 * x], d) for d in (0, 1, -1)]
        for name in ("cat", "concat", "concatenate", "stack")
    },
    "flatten": [lambda x: x.flatten(), lambda x: x.flatten(1), lambda x: torch.flatten(x, 0, 1)],
    "permute": [lambda x, s: x.permute(*reversed(range(len(s))))],
    **{name: [lambda x, n=name: getattr(x, n)(0, 1)] for name in ("transpose", "swapaxes", "swapdims")},
    "t": [lambda x: x.t()],
    "movedim": [lambda x: x.movedim(0, -1)],
    "moveaxis": [lambda x: torch.moveaxis(x, 1, 0)],
    "unsqueeze": [lambda x: x.unsqueeze(1), lambda x: x.unsqueeze(-1)],
    "flip": [lambda x: x.flip(0), lambda x: x.flip(1), lambda x: torch.flip(x, (0, -1))],
    "fliplr": [torch.fliplr],
    "flipud": [torch.flipud],
    "pad": [lambda x: F.pad(x, (1, 2)), lambda x: F.pad(x, (0, 0, 1, 1)), lambda x: F.pad(x, (1, -1))]
    + [lambda x, m=m: F.pad(x, (1, 1), mode=m) for m in ("reflect", "circular", "replicate")]
    + [lambda x: F.pad(x, (0, 0, 1, 1), mode="reflect"), lambda x: F.pad(x, (0, 0, 0, 0, 1, 1))],
    "repeat": [lambda x, s: x.repeat(*[2] * len(s)), lambda x, s: x.repeat(3, *[1] * len(s))],
    "tile": [lambda x: x.tile((2,)), lambda x: torch.tile(x, (2, 1))],
    "expand_as": [lambda x: x[:1].expand_as(x), lambda x: x.mean(0).expand_as(x)],
    "view": [lambda x: x.view(-1), lambda x: x.view(x.shape[0], -1), lambda x, s: x.view(-1, 2, *s[2:])],
    "reshape": [lambda x: x.reshape(x.shape[0], -1), lambda x: x.reshape(-1, x.shape[-1]), lambda x: x.reshape(-1, 2)],
    "expand": [lambda x, s: x.expand(2, *[-1] * len(s))],
    "getitem": [lambda x: x[:, 1:], lambda x: x[..., 0], lambda x: x[None], lambda x: x[::2], lambda x: x[:, [1, 0]]],
    "chunk": [lambda x, d=d: x.chunk(2, d)[0] for d in (0, 1)],
    "split": [lambda x, d=d: torch.split(x, 1, d)[1] for d in (0, 1)],
    "tensor_split": [lambda x, d=d: x.tensor_split(2, d)[1] for d in (0, 1)],
    "narrow": [lambda x, d=d: x.narrow(d, 0, 2) for d in (0, 1)],
    "select": [lambda x, d=d: x.select(d, 1) for d in (0, 1)],
    "index_select": [lambda x, d=d: x.index_select(d, torch.tensor([1, 0])) for d in (0, 1)],
    "unbind": [lambda x: x.unbind(0)[1], lambda x: x.unbind(1)[1]],
    "squeeze": [lambda x: x[:1].squeeze(), lambda x: x[:1].squeeze(0)],
    "roll": [lambda x: x.roll(1, 0), lambda x: x.roll(1), lambda x: torch.roll(x, 1, 1)],
}
N = (1, 2, 3)
PADS = [f"{kind}Pad{n}d" for kind in ("Reflection", "Replication", "Zero", "Circular") for n in N]
MODULES = {
    **{kind: [kind()] for kind in channel_ops.ELEMENTWISE_MODULES if kind is not nn.Threshold},
    nn.Threshold: [nn.Threshold(0.5, 0.0)],
    **{getattr(nn, f"MaxPool{n}d"): [getattr(nn, f"MaxPool{n}d")(3, 1, 1)] for n in N},
    **{getattr(nn, f"AvgPool{n}d"): [getattr(nn, f"AvgPool{n}d")(3, 1, 1)] for n in N},
    **{getattr(nn, f"LPPool{n}d"): [getattr(nn, f"LPPool{n}d")(2, 1)] for n in (1, 2)},
    **{
        getattr(nn, f"Adaptive{kind}Pool{n}d"): [getattr(nn, f"Adaptive{kind}Pool{n}d")((None,) * n if n > 1 else 7)]
        for kind, n in itertools.product(("Avg", "Max"), N)
    },
    nn.Upsample: [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.0)],
    nn.UpsamplingNearest2d: [nn.UpsamplingNearest2d(scale_factor=2)],
    nn.UpsamplingBilinear2d: [nn.UpsamplingBilinear2d(scale_factor=2)],
    **{getattr(nn, name): [getattr(nn, name)(1)] for name in PADS},
    **{getattr(nn, f"ConstantPad{n}d"): [getattr(nn, f"ConstantPad{n}d")(1, 2.0)] for n in N},
}
