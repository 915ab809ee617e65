"""What layers pad, and how large their results are: as torch computes it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passes.layers.grouped import GroupedConv2d, GroupedLinear
from passes.layers.known.geometry import conv_groups, is_layer, is_linear, output_sizes, padding_list, spatial_dims
from passes.layers.masked import MaskedConv2d, MaskedLinear
from passes.layers.plan import LayerPlan

CONVOLUTIONS = [
    (nn.Conv1d(2, 4, 4, padding="same"), (9,)),
    (nn.Conv2d(2, 4, (3, 4), padding="same", dilation=(1, 3)), (12, 13)),
    (nn.Conv2d(2, 4, 3, padding="valid", stride=2), (8, 9)),
    (nn.Conv2d(2, 4, 3, stride=(2, 3), padding=(1, 2), dilation=(2, 1), padding_mode="reflect"), (9, 10)),
    (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 2), groups=2), (4, 5, 6)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("layer", "sizes"), CONVOLUTIONS, ids=str)
def test_convolutions(layer, sizes):
    x = torch.randn(1, 2, *sizes)
    assert output_sizes(layer, sizes) == list(layer(x).shape[2:])
    assert padding_list(layer) == list(layer._reversed_padding_repeated_twice)
    if layer.padding_mode == "zeros":
        unpadded = type(layer)(2, 4, layer.kernel_size, layer.stride, 0, layer.dilation, layer.groups)
        unpadded.load_state_dict(layer.state_dict())
        torch.testing.assert_close(unpadded(F.pad(x, padding_list(layer))), layer(x))
    assert (is_layer(layer), is_linear(layer), spatial_dims(layer)) == (True, False, len(sizes))
    assert conv_groups(layer) == layer.groups


def test_kinds():
    conv, linear = nn.Conv2d(2, 4, 1), nn.Linear(2, 4)
    plans = [
        LayerPlan.of(layer, labels=torch.tensor([0, 0, 1, 1]), keep=torch.eye(2).bool(), requested_ratio=0.5)
        for layer in (conv, linear)
    ]
    convs = conv, MaskedConv2d.from_dense(conv), GroupedConv2d.from_dense(conv, plans[0])
    linears = linear, MaskedLinear.from_dense(linear), GroupedLinear.from_dense(linear, plans[1])
    assert [(is_layer(x), is_linear(x), spatial_dims(x), conv_groups(x)) for x in convs] == [(True, False, 2, 1)] * 3
    assert [(is_layer(x), is_linear(x), spatial_dims(x), conv_groups(x)) for x in linears] == [(True, True, 0, 1)] * 3
    assert not any(is_layer(x) for x in (nn.BatchNorm2d(2), nn.MaxPool2d(2), None))
