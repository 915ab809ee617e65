"""The paper's tables: what the compiler yields, against the arithmetic done by hand."""

from dataclasses import replace

import pytest
from torch import nn

import sgfx
from sgfx.published import TABLES, Reading, Table
from sgfx.tables import format_table, paper_params, rows

# Expected from the arithmetic on the dense models: (conv, fc) ratio to parameters as the paper counts them, and MACs.
RESNET50 = {
    (0, 0): (25.557e6, 4.089e9),
    (0.6, 0.6): (11.92e6, 1.922e9),
    (0.7, 0.6): (9.855e6, 1.561e9),
    (0.8, 0.6): (7.787e6, 1.200e9),
}
DENSENET121 = {
    (0, 0): (6.893e6, 888.35e6),
    (0.80, 0.80): (1.396e6, 179.09e6),
    (0.95, 0.95): (0.366e6, 46.10e6),
}


@pytest.mark.parametrize(("number", "expected"), [(1, DENSENET121), (3, RESNET50)])
def test_sizes_are_within_one_percent_of_the_arithmetic(number, expected):
    table = TABLES[number - 1]
    some = tuple(row for row in table.rows if row[1:3] in expected)
    compiled = list(rows(replace(table, rows=some)))
    assert {(row.conv_ratio, row.linear_ratio) for row in compiled} == expected.keys()
    for row in compiled:
        params, macs = expected[row.conv_ratio, row.linear_ratio]
        assert row.params == pytest.approx(params, rel=0.01)
        assert row.macs == pytest.approx(macs, rel=0.01)
        if number == 3:  # and of what the paper prints
            assert abs(row.params_difference) < 0.01
            assert abs(row.macs_difference) < 0.01


def test_the_papers_count_takes_weights_two_per_live_filter_and_live_biases():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False), nn.Flatten()
    )
    model.append(nn.Linear(4, 5))
    assert paper_params(model) == (8 * 3 * 9 + 2 * 8) + (4 * 8 + 2 * 4) + (5 * 4 + 5)
    small = sgfx.compile(model, ratio=0.5, overrides={"5": {"groups": 5}})
    plans = sgfx.plans(small)
    conv, linear = plans["3"], plans["5"]
    live = [sum(filters for filters, inputs in plan.block_sizes if inputs) for plan in (conv, linear)]
    expected = (8 * 3 * 9 + 2 * 8) + (conv.connections + 2 * live[0]) + (linear.connections + live[1])
    assert paper_params(small) == expected


def test_a_table_prints_published_and_compiled_sizes_side_by_side():
    table = TABLES[2]
    row = next(iter(rows(table)))
    text = format_table(table, [row])
    assert "ResNet-50" in text
    assert "25.55M" in text
    assert "25.557M" in text
    assert "+0.0%" in text


def test_a_transferred_network_is_counted_under_each_reading_of_its_head():
    readings = (Reading("dense", 30), Reading("pruned", 30, pruned=True))
    lines = (("Baseline", 0, 0, 1e6, 40e6), ("half", 0.5, 0.6, 1e6, 20e6))
    table = Table(9, "ResNet-20 on birds", "resnet20", 32, 4, lines, head="linear", readings=readings)
    dense, half = found = list(rows(table))
    trunk = 269_722 - 65 * 10
    assert dense.readings == {"dense": trunk + 65 * 30, "pruned": trunk + 65 * 30}
    assert (dense.params, dense.true_params) == (trunk + 65 * 30,) * 2
    assert dense.macs == 40_551_040 - 64 * 10
    assert half.readings["dense"] - half.readings["pruned"] == round(0.6 * 64 * 30)
    assert half.params == half.readings["dense"] < dense.params
    text = format_table(table, found)
    assert text.splitlines()[1].split("  ")[0] == "model"
    assert "pruned" in text


def test_the_papers_baselines_have_the_likely_head():
    for table in TABLES[4:6]:
        trunk = 25_557_032 - 2_049_000
        assert trunk + 2049 * table.readings[0].outputs == pytest.approx(table.rows[0][3], rel=0.003)
