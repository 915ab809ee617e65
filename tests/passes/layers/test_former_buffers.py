"""Buffers in which earlier versions kept a structure: read for what they are, or refused with what is wrong."""

import pytest
import torch
from torch import nn

import sgfx
from passes.layers.former_buffers import BUFFERS, former_structure
from passes.layers.grouped import GroupedLinear
from passes.layers.plan import LayerPlan

SHAPE = ("Linear", 3, 4, ())  # three inputs, four filters
# Filters 2 and 0 read inputs 0 and 2, filters 1 and 3 read input 1.
WRITTEN = {
    "filters": torch.tensor([0, 2, 1, 3]),
    "inputs": torch.tensor([0, 2, 1]),
    "block_sizes": torch.tensor([[2, 2], [2, 1]]),
}


def test_the_buffers_are_the_structure_that_they_were_written_for():
    found = former_structure(WRITTEN, SHAPE)
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.keep.tolist() == [[True, False, True], [False, True, False]]
    assert found.requested_ratio == found.achieved_ratio == 0.5  # 6 of 12 connections
    assert former_structure(WRITTEN, SHAPE, ratio=0.45).requested_ratio == 0.45


def test_they_are_the_inverse_of_the_tables_that_layers_have_now():
    labels, keep = torch.tensor([2, 0, 1, 0, 2]), torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    layer = nn.Linear(7, 5)
    plan = LayerPlan.of(layer, labels=labels, keep=keep, requested_ratio=0.6)
    grouped = GroupedLinear.from_dense(layer, plan)
    assert former_structure({name: getattr(grouped, name) for name in BUFFERS}, plan.shape, 0.6) == plan


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", None, "there is no inputs"),
        ("filters", WRITTEN["filters"].float(), "filters is float32, not int64 with values"),
        ("filters", WRITTEN["filters"].to("meta"), "filters is int64, not int64 with values"),
        ("filters", WRITTEN["filters"].to_sparse(), "filters is int64, not int64 with values"),
        ("block_sizes", torch.zeros(2, dtype=torch.int64), r"the shapes \[4\], \[3\], \[2\]"),
        ("block_sizes", torch.zeros(2, 3, dtype=torch.int64), r"the shapes \[4\], \[3\], \[2, 3\]"),
        ("inputs", WRITTEN["inputs"][None], r"the shapes \[4\], \[1, 3\], \[2, 2\]"),
        ("block_sizes", torch.tensor([[2, 2], [2, 2]]), "the sizes of its blocks are others"),
        ("block_sizes", torch.tensor([[6, 2], [-2, 1]]), "the sizes of its blocks are others"),
        ("block_sizes", torch.tensor([[2**62] * 2] * 4 + [[4, 3]]), "the sizes of its blocks are others"),
        ("filters", torch.tensor([0, 2, 1, 4]), "its filters are not those from 0 to 3, each once"),
        ("filters", torch.tensor([0, 2, 1, 1]), "its filters are not those from 0 to 3, each once"),
        ("filters", torch.tensor([0, 2, 1, -1]), "its filters are not those from 0 to 3, each once"),
        ("inputs", torch.tensor([0, 3, 1]), "its inputs are not from 0 to 2"),
        ("inputs", torch.tensor([0, -1, 1]), "its inputs are not from 0 to 2"),
        ("inputs", torch.tensor([2, 2, 1]), "a group reads an input twice"),
        ("block_sizes", torch.tensor([[4, 3], [0, 0]]), r"labels must use every group from 0 to 1, found \[0\]"),
    ],
)
def test_other_numbers_are_refused(name, value, message):
    with pytest.raises(sgfx.InputError, match=f"filters, inputs and block_sizes make no structure of it: .*{message}"):
        former_structure(WRITTEN | {name: value}, SHAPE)


def test_a_layer_keeps_a_connection():
    nothing = {"filters": torch.arange(4), "inputs": torch.arange(0), "block_sizes": torch.tensor([[4, 0]])}
    with pytest.raises(sgfx.InputError, match=r"requested_ratio must lie in \[0, 1\)"):
        former_structure(nothing, SHAPE)
