"""From layers to tables: by hand, and one refusal per rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from passes.errors import InputError
from passes.freezing.choosing.packing import layer_blocks, layer_geometry
from passes.kernel import Block, Geometry, Margins
from passes.kernel.layout.packing import pack
from passes.layers.grouped import GroupedConv2d, GroupedLinear
from passes.layers.plan import LayerPlan


def block(filters: list[int], inputs: list[int], *kernel: int) -> Block:
    shape = (len(filters), len(inputs), *(kernel or (1, 1)))
    return Block(
        torch.tensor(filters),
        torch.tensor(inputs, dtype=torch.int64),
        torch.arange(torch.Size(shape).numel()).float().view(shape),
    )


def test_tables_by_hand() -> None:
    # Filters 2, 0, 1 read channels 1 and 3; at most two filters in a piece. Filter 3 is in no block: its bias alone.
    bias = torch.tensor([10.0, 11.0, 12.0, 13.0])
    tables = pack([block([2, 0, 1], [1, 3])], bias, Geometry(4, 5), most_filters=2)
    assert tables.weight.tolist() == [0, 2, 1, 3, 4, 5]  # inputs outside, filters inside
    assert tables.bias.tolist() == [12, 10, 11, 13]
    assert tables.inputs.tolist() == [1, 3]
    assert tables.filters.tolist() == [2, 0, 1, 3]
    assert tables.blocks[:, :5].tolist() == [[2, 2, 0, 0, 0], [1, 2, 0, 2, 4], [1, 0, 2, 3, 6], [0, 0, 2, 4, 6]]
    assert tables.blocks[:, 5].diff().gt(0).all()


def test_taps_lie_between_inputs_and_filters() -> None:
    tables = pack([block([0, 1], [0], 1, 3)], None, Geometry(2, 1, (1, 3)), most_filters=8)
    assert tables.weight.tolist() == [0, 3, 1, 4, 2, 5]
    assert tables.bias.tolist() == [0, 0]


def test_pieces_are_of_nearly_equal_size() -> None:
    tables = pack([block(list(range(17)), [0])], None, Geometry(17, 1), most_filters=8)
    assert tables.blocks[:-1, 0].tolist() == [6, 6, 5]


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv2d(4, 6, 3), [(6, 4)]),
        (nn.Conv2d(4, 6, 3, groups=2), [(3, 2), (3, 2)]),
        (nn.Linear(4, 6), [(6, 4)]),
    ],
    ids=["dense", "two groups", "linear"],
)
def test_blocks_hold_every_weight_once(layer: nn.Conv2d | nn.Linear, sizes: list[tuple[int, int]]) -> None:
    blocks = layer_blocks(layer)
    assert [(len(each.filters), len(each.inputs)) for each in blocks] == sizes
    assert torch.equal(torch.cat([each.weight.flatten() for each in blocks]), layer.weight.flatten())


def test_blocks_of_regrouped_layers_are_their_groups() -> None:
    labels, keep = torch.tensor([1, 0, 1]), torch.tensor([[True, False], [True, True]])
    for layer, kind in ((nn.Conv2d(2, 3, 3), GroupedConv2d), (nn.Linear(2, 3), GroupedLinear)):
        blocks = layer_blocks(
            kind.from_dense(layer, LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=0.2))
        )
        assert [(each.filters.tolist(), each.inputs.tolist()) for each in blocks] == [([1], [0]), ([0, 2], [0, 1])]
        for each in blocks:
            expected = layer.weight[each.filters][:, each.inputs]
            assert torch.equal(each.weight.flatten(), expected.flatten())


def test_geometry_of_layers() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2))
    assert layer_geometry(conv) == Geometry(6, 4, (3, 5), (2, 1), (1, 1, 2, 2), (1, 2))
    assert layer_geometry(nn.Conv2d(4, 6, (3, 4), padding="same")).padding == (1, 1, 1, 2)
    assert layer_geometry(nn.Conv2d(4, 6, 3, padding="valid")).padding == (0, 0, 0, 0)
    assert layer_geometry(nn.Linear(4, 6)) == Geometry(6, 4)


def test_margins_are_the_padding_with_one_row_for_what_lies_left() -> None:
    assert Geometry(1, 1, (3, 3), padding=(1, 1, 1, 1)).margins() == Margins(2, 1, 1)
    assert Geometry(1, 1).margins() == Margins()
    picture = torch.randn(2, 3, 4, 5)
    assert torch.equal(Margins(2, 1, 3).strip(Margins(2, 1, 3).apply(picture)), picture)


def test_refusals() -> None:
    geometry = Geometry(2, 2)
    with pytest.raises(InputError, match=r"weight of block 0 must be \[2, 1, 3, 3\], not \[2, 1, 1, 1\]"):
        pack([block([0, 1], [0])], None, Geometry(2, 2, (3, 3)), 8)
    with pytest.raises(InputError, match=r"reads inputs outside 0 … 1"):
        pack([block([0, 1], [2])], None, geometry, 8)
    with pytest.raises(InputError, match=r"every filter of 0 … 1 must be in one block"):
        pack([block([0, 1], [0]), block([1], [0])], None, geometry, 8)
    with pytest.raises(InputError, match=r"every filter of 0 … 1 must be in one block"):
        pack([block([0, 2], [0])], None, geometry, 8)
    with pytest.raises(InputError, match=r"bias must be \[2\], not \[3\]"):
        pack([block([0, 1], [0])], torch.zeros(3), geometry, 8)
    with pytest.raises(InputError, match=r"computes in fp32, block 0 has torch.float64 weights"):
        pack(layer_blocks(nn.Conv2d(2, 2, 1).double()), None, geometry, 8)
    with pytest.raises(InputError, match="Conv2d and Linear layers, dense or regrouped, not Conv1d"):
        layer_blocks(nn.Conv1d(1, 1, 1))
    with pytest.raises(InputError, match="padding_mode='reflect'"):
        layer_geometry(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(InputError, match="is no convolution"):
        Geometry(1, 1, stride=(0, 1))
