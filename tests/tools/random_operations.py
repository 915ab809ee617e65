"""What random networks are made of: operations on tensors, as modules that torch.fx traces through, and layers.

Every operation takes one or two tensors, the shape that the first one had when the network was drawn (as code that
counts on fixed sizes would), and two small numbers to choose among its variants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]


def shuffle(x: Tensor, groups: int) -> Tensor:
    """ShuffleNet's channel shuffle, with sizes read from the tensor."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def swap_halves(x: Tensor) -> Tensor:
    """The second half of the channels in front of the first."""
    first, second = x.chunk(2, 1)
    return torch.cat((second, first), 1)


def write_slice(x: Tensor, until: int) -> Tensor:
    """Write through a view of a copy."""
    y = x.clone()
    y[:, :until].mul_(2)
    return y


def set_slice(x: Tensor, y: Tensor, until: int) -> Tensor:
    """Assign to a slice of a copy."""
    z = x.clone()
    z[:, :until] = y[:, :until]
    return z


def add_in_place(x: Tensor, y: Tensor) -> Tensor:
    """The residual sum as many networks write it."""
    x += y
    return x


def gate(x: Tensor, y: Tensor) -> Tensor:
    """A squeeze-excite product."""
    return x * torch.sigmoid(y.mean((2, 3), keepdim=True))


def halve_quietly(x: Tensor) -> None:
    """Work in place, which the name does not say; autograd knows of it."""
    x.mul_(0.5)


def clip_a_slice(x: Tensor) -> None:
    """The same through a view of some channels."""
    x[:, 1:3].detach().clamp_(-1, 1)


def changed(change: Callable[[Tensor], None], x: Tensor) -> Tensor:
    """Change a tensor and go on with what it was called before."""
    change(x)
    return x


torch.fx.wrap("halve_quietly")
torch.fx.wrap("clip_a_slice")

Operation = Callable[..., Tensor]
ONE: dict[str, Operation] = {
    "relu": lambda x, s, a, b: F.relu(x),
    "relu in place": lambda x, s, a, b: x.relu_(),
    "relu in place, functional": lambda x, s, a, b: F.relu(x, inplace=True),
    "silu": lambda x, s, a, b: F.silu(x),
    "sigmoid": lambda x, s, a, b: x.sigmoid(),
    "affine": lambda x, s, a, b: x * 0.5 + a,
    "clamp": lambda x, s, a, b: x.clamp(-1, 1 + a),
    "softmax": lambda x, s, a, b: x.softmax(1),
    "cumsum": lambda x, s, a, b: x.cumsum(1),
    "normalize": lambda x, s, a, b: F.normalize(x, dim=1),
    "centre": lambda x, s, a, b: x - x.mean(1, keepdim=True),
    "zeros": lambda x, s, a, b: x - x,
    "detach": lambda x, s, a, b: x.detach() + x,
    "where": lambda x, s, a, b: torch.where(x > 0, x, 0.1 * x),
    "max pool": lambda x, s, a, b: F.max_pool2d(x, 2),
    "max pool over channels": lambda x, s, a, b: F.max_pool3d(x, 3, 1, 1),
    "average pool over channels": lambda x, s, a, b: F.avg_pool3d(x, (3, 1, 1), 1, (1, 0, 0)),
    "adaptive pool over channels": lambda x, s, a, b: F.adaptive_max_pool3d(x, (s[1], 1 + a % 2, 2)),
    "pool over features": lambda x, s, a, b: F.max_pool1d(x, 3, 1, 1) if x.dim() == 2 else F.max_pool1d(x[0], 3, 1, 1),
    "change in place": lambda x, s, a, b: changed(halve_quietly, x),
    "change channels in place": lambda x, s, a, b: changed(clip_a_slice, x),
    "relu by keyword": lambda x, s, a, b: F.relu(inplace=a % 2 == 0, input=x),
    "pool by keyword": lambda x, s, a, b: F.max_pool2d(kernel_size=2, input=x),
    "mean by keyword": lambda x, s, a, b: torch.mean(input=x, **{"axis": (2, 3), "keepdims": a % 2 == 0}),
    "pad by keyword": lambda x, s, a, b: F.pad(pad=(0, 0, 0, 0, a % 4, b % 4), input=x),
    "chunk by keyword": lambda x, s, a, b: x.chunk(dim=1, chunks=2)[a % 2],
    "reshape by keyword": lambda x, s, a, b: x.reshape(shape=(s[0], -1, s[2], s[3])),
    "average pool": lambda x, s, a, b: F.avg_pool2d(x, 3, 2, 1),
    "adaptive pool": lambda x, s, a, b: F.adaptive_avg_pool2d(x, 1 + a % 2),
    "mean": lambda x, s, a, b: x.mean((2, 3), keepdim=a % 2 == 0),
    "mean of channels": lambda x, s, a, b: x.mean(1, keepdim=True),
    "flip channels": lambda x, s, a, b: x.flip(1),
    "flip": lambda x, s, a, b: torch.flip(x, (1, 3)) if a % 2 else x.flip(-1),
    "roll": lambda x, s, a, b: x.roll(1 + a, 1),
    "slice": lambda x, s, a, b: x[:, a : a + b + 1],
    "slice from the end": lambda x, s, a, b: x[:, -(1 + a) :],
    "every second": lambda x, s, a, b: x[:, a % 2 :: 2],
    "narrow": lambda x, s, a, b: x.narrow(1, min(a, s[1] - 1), 1 + b % (s[1] - min(a, s[1] - 1))),
    "pick one": lambda x, s, a, b: x[:, a % s[1]].unsqueeze(1),
    "permute by index": lambda x, s, a, b: x[:, [(i * 3 + a) % s[1] for i in range(s[1])]],
    "swap halves": lambda x, s, a, b: swap_halves(x),
    "glu": lambda x, s, a, b: F.glu(x, 1),
    "split": lambda x, s, a, b: x.split([1 + a, s[1] - 1 - a], 1)[b % 2],
    "split evenly": lambda x, s, a, b: torch.split(x, 1 + a % s[1], dim=1)[0],
    "unbind": lambda x, s, a, b: torch.stack(x.unbind(1)[::-1], 1),
    "pad channels": lambda x, s, a, b: F.pad(x, (0, 0, 0, 0, a % 4, b % 4)),
    "pad channels with ones": lambda x, s, a, b: F.pad(x, (0, 0, 0, 0, a % 4, b % 4), value=1.0),
    "cut channels by padding": lambda x, s, a, b: F.pad(x, (0, 0, 0, 0, -1, a % 3)),
    "pad": lambda x, s, a, b: F.pad(x, (1, 0, a % 2, 1), mode="reflect" if b % 2 else "constant"),
    "shuffle": lambda x, s, a, b: shuffle(x, 2 + a % 2),
    "view": lambda x, s, a, b: x.view(s[0], s[1] // 2, s[2] * 2, s[3]),
    "reshape": lambda x, s, a, b: x.reshape(x.shape[0], -1, s[2], s[3] // 2),
    "swap axes": lambda x, s, a, b: x.transpose(1, 2),
    "channels last and back": lambda x, s, a, b: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "flatten and back": lambda x, s, a, b: x.flatten(2).unflatten(2, s[2:]),
    "flatten": lambda x, s, a, b: x.flatten(1) if a % 2 else torch.flatten(x, start_dim=1),
    "to four axes": lambda x, s, a, b: x[:, :, None, None] if x.dim() == 2 else x,
    "upsample": lambda x, s, a, b: F.interpolate(x, scale_factor=2, mode="bilinear" if a % 2 else "nearest"),
    "repeat": lambda x, s, a, b: x.repeat(1, 2, 1, 1),
    "repeat each": lambda x, s, a, b: x.repeat_interleave(2, 1),
    "expand": lambda x, s, a, b: x[:, :1].expand(-1, 1 + a, -1, -1),
    "pixel shuffle": lambda x, s, a, b: F.pixel_shuffle(x, 2),
    "write to a slice": lambda x, s, a, b: write_slice(x, 1 + a),
}
TWO: dict[str, Operation] = {
    "add": lambda x, y, s, a, b: x + y,
    "add in place": lambda x, y, s, a, b: add_in_place(x, y),
    "subtract": lambda x, y, s, a, b: torch.sub(x, y),
    "multiply": lambda x, y, s, a, b: x * y,
    "gate": lambda x, y, s, a, b: gate(x, y),
    "cat": lambda x, y, s, a, b: torch.cat((x, y) if a % 2 else (y, x), 1),
    "cat by keyword": lambda x, y, s, a, b: torch.cat(dim=1, tensors=(x, y) if a % 2 else [y, x]),
    "add by keyword": lambda x, y, s, a, b: torch.add(other=y, input=x, alpha=1 + a % 2),
    "cat with itself": lambda x, y, s, a, b: torch.cat([x, y, x], dim=1),
    "cat other axis": lambda x, y, s, a, b: torch.cat([x, y], -1),
    "stack": lambda x, y, s, a, b: torch.stack((x, y), 2).flatten(1, 2),
    "set slice": lambda x, y, s, a, b: set_slice(x, y, 1 + a),
    "matmul": lambda x, y, s, a, b: x @ y.transpose(-1, -2),
    "padded shortcut": lambda x, y, s, a, b: x + F.pad(y, (0, 0, 0, 0, 0, s[1] - y.shape[1])),
}
OPERATIONS = {1: ONE, 2: TWO}


class Apply(nn.Module):
    """An operation as a module; some of them do something else in train mode."""

    def __init__(self, name: str, arity: int, shape: Shape, a: int, b: int) -> None:
        """Keep the name, not the function, so that the module can be copied and printed."""
        super().__init__()
        self.name, self.arity, self.shape, self.numbers = name, arity, shape, (a, b)
        self.branches = a == b  # one in eight: twice the value in train mode, or other channels

    def forward(self, *tensors: Tensor) -> Tensor:
        """Apply it."""
        value: Tensor = OPERATIONS[self.arity][self.name](*tensors, self.shape, *self.numbers)
        if self.branches and self.training:
            return value.flip(1) if self.numbers[0] % 2 else value * 2
        return value

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.name!r}, {self.numbers}"


class Functional(nn.Module):
    """Uses the parameters of a layer itself."""

    def __init__(self, channels: int) -> None:
        """Make the layer."""
        super().__init__()
        self.layer = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Call the layer, and apply its weight once more."""
        return F.conv2d(self.layer(x), self.layer.weight)


class ByKeyword(nn.Module):
    """Calls a layer, and a norm and an activation behind it, by keyword."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Keep the layer, under a name that Python keeps for itself."""
        super().__init__()
        self.add_module("in", layer)
        self.norm, self.act = nn.BatchNorm2d(layer.out_channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Call them."""
        y: Tensor = self.act(input=self.norm(input=getattr(self, "in")(input=x)))
        return y


class ChannelsLast(nn.Module):
    """A layer over the channels as the last axis, as ConvNeXt has them."""

    def __init__(self, *layers: nn.Module) -> None:
        """Keep the layers."""
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Permute, apply, permute back."""
        y: Tensor = self.layers(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


class Scale(nn.Module):
    """A factor and a shift for every channel, as plain parameter and buffer."""

    shift: Tensor

    def __init__(self, channels: int) -> None:
        """Make them."""
        super().__init__()
        self.factor = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("shift", torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply them."""
        return x * self.factor + self.shift


class SqueezeExcite(nn.Module):
    """MobileNet's squeeze-excite block."""

    def __init__(self, channels: int) -> None:
        """Make its two convolutions."""
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Weight the channels."""
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Tokens(nn.Module):
    """Attention over the pixels."""

    def __init__(self, channels: int, variant: int) -> None:
        """Make the attention and a linear layer behind it."""
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2 if channels % 2 == 0 else 1, batch_first=True)
        self.after = nn.Linear(channels, channels)
        self.weights = variant % 2 == 0

    def forward(self, x: Tensor) -> Tensor:
        """Attend, apply, and go back to the image."""
        tokens: Tensor = x.flatten(2).transpose(1, 2)
        tokens = self.after(self.attention(tokens, tokens, tokens, need_weights=self.weights)[0])
        return tokens.transpose(1, 2).reshape(x.shape)


def _layer4(make: Callable[[int, int, int], nn.Module]) -> Callable[[Shape, int, int], nn.Module]:
    return lambda shape, a, b: make(shape[1], 4 + a, b) if len(shape) == 4 else nn.Linear(shape[-1], 4 + a)


LAYERS: dict[str, Callable[[Shape, int, int], nn.Module]] = {
    "linear": lambda s, a, b: nn.Linear(s[-1], 4 + a, bias=b % 2 == 0),
    "norm of vectors": lambda s, a, b: nn.BatchNorm1d(s[1]) if a % 2 else nn.LayerNorm(s[-1]),
    "conv 1x1": _layer4(lambda c, n, b: nn.Conv2d(c, n, 1, bias=b % 2 == 0)),
    "conv 1x1 wide": _layer4(lambda c, n, b: nn.Conv2d(c, n + 8, 1)),
    "conv 3x3": _layer4(lambda c, n, b: nn.Conv2d(c, n, 3, padding=1, bias=b % 2 == 0)),
    "conv 3x3 again": _layer4(lambda c, n, b: nn.Conv2d(c, c, 3, padding=1)),
    "conv by keyword": _layer4(lambda c, n, b: ByKeyword(nn.Conv2d(c, n, 1, bias=b % 2 == 0))),
    "conv stride": _layer4(
        lambda c, n, b: nn.Conv2d(c, n, 3, 1 + b % 2, 1, padding_mode="reflect" if b % 4 else "zeros")
    ),
    "depthwise": _layer4(lambda c, n, b: nn.Conv2d(c, c * (1 + b % 2), 3, padding=1, groups=c)),
    "grouped": _layer4(lambda c, n, b: nn.Conv2d(c, n * 2, 1, groups=2 - c % 2)),
    "transposed": _layer4(lambda c, n, b: nn.ConvTranspose2d(c, n, 2)),
    "batch norm": _layer4(lambda c, n, b: nn.BatchNorm2d(c, track_running_stats=b > 0)),
    "conv, batch norm, relu": _layer4(
        lambda c, n, b: nn.Sequential(nn.Conv2d(c, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU(b % 2 == 0))
    ),
    "group norm": _layer4(lambda c, n, b: nn.GroupNorm(2 if c % 2 == 0 else 1, c)),
    "instance norm": _layer4(lambda c, n, b: nn.InstanceNorm2d(c, affine=True)),
    "layer norm": _layer4(lambda c, n, b: ChannelsLast(nn.LayerNorm(c), nn.Linear(c, n), nn.GELU(), nn.Linear(n, c))),
    "prelu": _layer4(lambda c, n, b: nn.PReLU(c)),
    "dropout": _layer4(lambda c, n, b: nn.Dropout2d(0.5)),
    "scale": _layer4(lambda c, n, b: Scale(c)),
    "squeeze-excite": _layer4(lambda c, n, b: SqueezeExcite(c)),
    "functional": _layer4(lambda c, n, b: Functional(c)),
}
