"""Subclasses of torch's layers as people write them, for the tests of custom layers."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class SameStatic(nn.Conv2d):
    """Pads as TensorFlow does, for a size that is known when it is made."""

    def __init__(self, channels_in, channels_out, kernel, stride=1, size=16, **options):
        super().__init__(channels_in, channels_out, kernel, stride, **options)
        whole = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        self.same = nn.ZeroPad2d((whole // 2, whole - whole // 2) * 2)

    def forward(self, x):
        return F.conv2d(self.same(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SameDynamic(nn.Conv2d):
    """Pads as TensorFlow does, whatever the size is."""

    def forward(self, x):
        sizes = zip(x.shape[-2:], self.weight.shape[-2:], self.stride, strict=True)
        rows, columns = (max((-(-size // step) - 1) * step + kernel - size, 0) for size, kernel, step in sizes)
        if rows > 0 or columns > 0:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class WithNorm(nn.Conv2d):
    """A norm and an activation behind the convolution, as detectors have them."""

    def __init__(self, *arguments, norm=None, activation=None, **options):
        super().__init__(*arguments, **options)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Checked(WithNorm):
    """The same, with a branch on sizes that torch.fx can't trace."""

    def forward(self, x):
        if x.numel() == 0 and self.training:
            raise ValueError("nothing to normalise")
        return super().forward(x)


class ShapeReader(nn.Conv2d):
    """Asks its weight for sizes, and pads by them."""

    def forward(self, x):
        rows, columns = (size // 2 for size in self.weight.size()[-2:])
        x = F.pad(x, [columns, columns, rows, rows])
        return torch.conv2d(input=x, weight=self.weight, bias=self.bias, stride=self.stride)


class Gated(nn.Conv2d):
    """Takes a second argument."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class AroundTheCall(nn.Conv2d):
    """Has its own `_conv_forward` alone."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 2


class Named(nn.Conv2d):
    """Is torch's convolution, but for how it is made."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, padding_mode="reflect")


class BiasApart(nn.Conv2d):
    """Adds its bias itself."""

    def forward(self, x):
        y = F.conv2d(x, self.weight, None, self.stride, self.padding)
        return y + self.bias.view(1, -1, 1, 1)


class Signal(nn.Conv1d):
    """Causal: pads on the left alone."""

    def forward(self, x):
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Volume(nn.Conv3d):
    """An activation behind."""

    def forward(self, x):
        return F.relu(self._conv_forward(x, self.weight, self.bias))


class LowRank(nn.Linear):
    """An adapter of low rank beside the layer, as parameters and as layers."""

    def __init__(self, inputs, filters, rank=2):
        super().__init__(inputs, filters)
        self.down = nn.Parameter(torch.randn(rank, inputs))
        self.up = nn.Parameter(torch.randn(filters, rank))
        self.gate = nn.Linear(inputs, filters)

    def forward(self, x):
        own = F.linear(x, self.weight, self.bias)
        return own * self.gate(x).sigmoid() + x @ self.down.T @ self.up.T


class Scaling(nn.Conv2d):
    """Scales what it reads by a buffer and what it gives by a parameter."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("before", torch.rand(self.in_channels, 1, 1) + 0.5)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1) + 0.5)

    def forward(self, x):
        return super().forward(x * self.before) * self.gain


class Flipping(nn.Conv2d):
    """Gives its filters in another order."""

    def forward(self, x):
        return super().forward(x).flip(1)


class BothSigns(nn.Conv2d):
    """Gives each filter twice."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y, -y], 1)


class WithMean(nn.Conv2d):
    """Gives two tensors."""

    def forward(self, x):
        y = super().forward(x)
        return y, y.mean()


class Counting(nn.Conv2d):
    """Keeps a buffer and an attribute that its forward changes."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.seen += 1
        self.calls += 1
        return super().forward(x)


class Standardised(nn.Conv2d):
    """Computes its weight first."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Twice(nn.Conv2d):
    """Uses its weight twice."""

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.weight, None, self.stride, self.padding)


class Scaled(nn.Linear):
    """Scales its weight in training alone."""

    def forward(self, x):
        return F.linear(x, self.weight * 2 if self.training else self.weight, self.bias)


class DynamicallyScaled(nn.Conv2d):
    """The same behind a branch that torch.fx can't trace."""

    def forward(self, x):
        weight = self.weight / 2 if x.shape[-1] > 4 else self.weight
        return F.conv2d(x, weight, self.bias)


class Transposed(nn.Linear):
    """Reads its weight the other way round too."""

    def forward(self, x):
        return F.linear(F.linear(x, self.weight), self.weight.t())


class SelfHolding(nn.Conv2d):
    """Runs itself through an attribute."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.run = self._run

    def _run(self, x):
        return F.conv2d(x, self.weight, self.bias)

    def forward(self, x):
        return self.run(x)


class OwnState(nn.Conv2d):
    """Has state dicts of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "more"] = torch.zeros(1)


class Around(nn.Module):
    """A layer under test between two ordinary ones, so that it is neither first nor alone."""

    def __init__(self, layer, channels=16):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.layer = layer
        self.next = nn.Conv2d(channels, 12, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        return self.last(self.next(self.layer(self.stem(x).relu())).relu().mean((2, 3)))


def randomized(model, seed=0):
    """`model` in double precision with random norms, whose statistics are not those of a fresh one."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-1, 1)
    return model.double()
