"""Importance, self-grouping and truncation: hand-computed cases, an oracle, and properties."""

import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from passes.compression.grouping import centroids, group_filters, restarts
from passes.compression.importance import importance
from passes.compression.pruning import truncate
from passes.errors import InputError
from passes.layers.plan import LayerPlan, network_ratios
from tests.tools.clustering import inertia


def test_importance_of_a_convolution_is_the_norm_of_each_kernel():
    weight = torch.tensor([[[[3.0, -4.0]], [[0.0, 1.0]]], [[[0.0, 0.0]], [[-2.0, 2.0]]]])  # [2, 2, 1, 2]
    assert importance(weight).tolist() == [[7, 1], [0, 4]]
    assert importance(weight, "l2").tolist() == [[5, 1], [0, pytest.approx(8**0.5)]]
    assert importance(weight, lambda w: w.flatten(2).amax(2)).tolist() == [[3, 1], [0, 2]]


def test_importance_of_a_linear_layer_is_the_absolute_weight():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert importance(weight).tolist() == importance(weight, "l2").tolist() == [[1, 2], [0.5, 0]]


def test_importance_of_half_precision_weights_is_taken_in_single_precision():
    vectors = importance(torch.full((1, 1, 7, 7), 60000.0, dtype=torch.float16))  # the sum is beyond fp16
    assert vectors.dtype == torch.float32
    assert vectors.item() == pytest.approx(49 * 60000, rel=1e-3)
    assert importance(torch.ones(1, 1, dtype=torch.float64)).dtype == torch.float64


def test_importance_beyond_single_precision_is_taken_in_double():
    vectors = importance(torch.full((1, 2, 3, 3), 3e38))
    assert vectors.dtype == torch.float64
    assert vectors.tolist() == [[pytest.approx(27e38)] * 2]


def test_a_criterion_that_computes_in_place_leaves_the_weight():
    weight = -torch.ones(2, 3)
    assert importance(weight, lambda w: w.abs_()).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert weight.tolist() == [[-1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    with pytest.raises(InputError, match="NaN or infinite"):
        importance(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda w: w.sum(), r"returned shape \[\], expected \[C_out, C_in\] = \[2, 3\]"),
        (lambda w: w.abs().tolist(), "returned list"),
        (lambda w: w * float("nan"), "NaN, infinite or negative"),
        (lambda w: -w.abs() - 1, "NaN, infinite or negative"),
        (lambda w: w.flatten(5), "the criterion failed on a weight"),
    ],
)
def test_a_criterion_that_misbehaves_is_refused(criterion, message):
    with pytest.raises(InputError, match=message):
        importance(torch.randn(2, 3), criterion)


VECTORS = torch.tensor([[9.0, 0.0, 1.0], [0.0, 9.0, 0.0], [8.0, 1.0, 0.0], [0.0, 7.0, 2.0], [10.0, 2.0, 2.0]])


def test_filters_group_by_similarity_and_labels_follow_first_appearance():
    found = group_filters(VECTORS, groups=2)
    assert found.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.labels.dtype == torch.int64
    assert found.centroids.tolist() == [[9, 1, 1], [0, 8, 1]]
    # Squared distances by hand: filters 0, 2, 4 to (9, 1, 1), filters 1, 3 to (0, 8, 1).
    assert inertia(VECTORS, found.labels) == (1 + 0) + (1 + 0 + 1) + (1 + 1 + 1) + 2 * (1 + 1)


@pytest.mark.parametrize("scale", [2.0**120, 1e30, 1e-30, 1e-44])
def test_groups_do_not_depend_on_the_scale(scale):
    vectors = VECTORS if scale < 1e-40 else VECTORS * 0.7  # subnormal numbers are integers times the smallest one
    assert torch.equal(group_filters(vectors * scale, groups=2).labels, group_filters(VECTORS, groups=2).labels)


def test_clustering_gives_its_threads_back():
    before = torch.get_num_threads()
    group_filters(VECTORS, groups=2)
    assert torch.get_num_threads() == before


def test_equal_filters_leave_fewer_groups_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert group_filters(torch.ones(6, 4), groups=3).labels.tolist() == [0] * 6
        assert group_filters(torch.zeros(6, 4), groups=3).centroids.tolist() == [[0.0] * 4]
        two_kinds = torch.ones(6, 4)
        two_kinds[3:] = 2
        assert group_filters(two_kinds, groups=4).labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_more_groups_than_filters_is_clipped():
    assert sorted(group_filters(VECTORS, groups=50).labels.tolist()) == [0, 1, 2, 3, 4]


def test_fewer_than_one_group_is_refused():
    with pytest.raises(InputError, match="groups must be at least 1, not 0"):
        group_filters(VECTORS, groups=0)


def test_clustering_depends_on_its_seed_alone_and_leaves_global_random_state():
    vectors = torch.rand(40, 12, generator=torch.Generator().manual_seed(0))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = group_filters(vectors, groups=6, seed=3)
    after = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert after == (random.random(), np.random.rand(), torch.rand(1).item())
    assert torch.equal(first.labels, group_filters(vectors, groups=6, seed=3).labels)


def test_restarts_are_many_on_small_layers_and_few_on_large_ones():
    assert restarts(64, 64, 8) == 10
    assert restarts(2048, 512, 16) == 1
    assert 1 < restarts(256, 128, 16) < 10


def test_truncation_takes_the_smallest_entries_weighted_by_group_size():
    centroids = torch.tensor([[5.0, 1.0, 4.0], [2.0, 6.0, 3.0]])
    sizes = torch.tensor([1, 3])  # 12 connections; ascending: 1 (1), 2 (3), 3 (3), 4 (1), 5 (1), 6 (3)
    assert truncate(centroids, sizes, 0.0).all()
    assert truncate(centroids, sizes, 0.3).tolist() == [[True, False, True], [False, True, True]]  # 4 of 12
    assert truncate(centroids, sizes, 0.5).tolist() == [[True, False, True], [False, True, False]]  # 7, nearer than 4
    assert truncate(centroids, sizes, 0.99).tolist() == [[False, False, False], [False, True, False]]  # one is left


def test_truncation_breaks_ties_by_group_then_channel():
    keep = truncate(torch.ones(2, 3), torch.tensor([1, 1]), 0.5)
    assert keep.tolist() == [[False, False, False], [True, True, True]]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(InputError, match="ratio must be at least 0 and below 1"):
        truncate(torch.ones(1, 2), torch.ones(1, dtype=torch.int64), ratio)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0, 0.999), st.integers(0, 2**16), st.booleans())
def test_truncation_is_what_trying_every_count_finds(groups, inputs, ratio, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(groups, inputs, generator=generator, dtype=torch.float64)
    values = (values * 3).round() if ties else values
    sizes = torch.randint(1, 9, (groups,), generator=generator)
    keep = truncate(values, sizes, ratio)
    total = int(sizes.sum()) * inputs
    entries = sorted((values[g, c].item(), g, c) for g in range(groups) for c in range(inputs))
    shares = [sum(int(sizes[g]) for _, g, _ in entries[:n]) / total for n in range(len(entries))]
    best = min(abs(share - ratio) for share in shares)
    pruned = {(g, c) for g in range(groups) for c in range(inputs) if not keep[g, c]}
    assert pruned == {(g, c) for _, g, c in entries[: len(pruned)]}
    assert abs(shares[len(pruned)] - ratio) == pytest.approx(best, abs=1e-12)
    assert keep.any()


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 40), st.integers(4, 30), st.integers(1, 12), st.floats(0, 0.99), st.integers(0, 2**16))
def test_properties_of_every_random_layer(filters, inputs, groups, ratio, seed):
    vectors = torch.rand(filters, inputs, generator=torch.Generator().manual_seed(seed))
    found = group_filters(vectors, groups, seed=seed)
    sizes = torch.bincount(found.labels)
    assert len(found.labels) == filters
    assert len(sizes) <= min(groups, filters)
    assert sizes.min() >= 1
    for group in range(len(sizes)):
        assert torch.allclose(found.centroids[group], vectors[found.labels == group].double().mean(0))
    keep = truncate(found.centroids, sizes, ratio)
    plan = LayerPlan("Linear", inputs, filters, labels=found.labels, keep=keep, requested_ratio=ratio)
    one_entry = int(sizes.max()) / (filters * inputs)
    assert abs(plan.achieved_ratio - ratio) <= one_entry + 1e-12
    assert plan.connections == int(plan.mask().sum()) > 0


def test_centroids_are_taken_in_double_precision():
    vectors = torch.tensor([[1e8], [1.0], [1.0]])
    assert centroids(vectors, torch.zeros(3, dtype=torch.int64)).item() == (1e8 + 2) / 3


def plan(keep, labels, ratio=0.5, **shape):
    keep = torch.tensor(keep)
    given = {"kind": "Linear", "in_channels": keep.shape[1], "out_channels": len(labels)} | shape
    return LayerPlan(**given, labels=torch.tensor(labels), keep=keep, requested_ratio=ratio)


def test_a_plan_counts_its_blocks_and_connections():
    example = plan([[True, False], [True, True]], [0, 1, 0], kernel_size=(3, 3), kind="Conv2d")
    assert example.groups == 2
    assert example.block_sizes == [(2, 1), (1, 2)]
    assert example.connections == 4
    assert example.achieved_ratio == pytest.approx(2 / 6)
    assert example.weights == 54
    assert example.mask().tolist() == [[True, False], [True, True], [True, False]]


def test_the_ratio_of_a_network_weighs_each_layer_by_its_weights():
    small = plan([[True, False]], [0, 0], ratio=0.5)  # 2 of 4 weights
    large = plan([[True, False, False, False]], [0, 0], ratio=0.7, kernel_size=(3,))  # 18 of 24
    alone = LayerPlan("Conv2d", 3, 4, (3, 3), reason="first convolution")
    requested, achieved = network_ratios({"a": small, "b": large, "c": alone})
    assert requested == pytest.approx((0.5 * 4 + 0.7 * 24) / 28)
    assert achieved == pytest.approx((2 + 18) / 28)


def test_plans_are_equal_by_value_and_survive_pickling():
    example = plan([[True, False]], [0, 0])
    copied = pickle.loads(pickle.dumps(example))
    assert copied == example
    assert hash(copied) == hash(example)
    assert copied != plan([[False, True]], [0, 0])
    assert copied != plan([[True, False]], [0, 0], ratio=0.4)
    with pytest.raises(AttributeError):
        example.labels = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reason": "small"}, "either labels, keep and requested_ratio, or a reason"),
        ({"labels": None}, "either labels, keep and requested_ratio, or a reason"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be int64 \[2\]"),
        ({"labels": torch.zeros(2)}, r"labels must be int64 \[2\], not float32"),
        ({"labels": torch.tensor([0, 0])}, "every group from 0 to 1, found"),
        ({"labels": torch.tensor([1, 2])}, "every group from 0 to 1, found"),
        ({"keep": torch.ones(2, 4, dtype=torch.bool)}, r"keep must be bool \[groups, 3\]"),
        ({"requested_ratio": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_a_plan_checks_itself(changes, message):
    good = {"labels": torch.tensor([0, 1]), "keep": torch.ones(2, 3, dtype=torch.bool), "requested_ratio": 0.5}
    with pytest.raises(InputError, match=message):
        LayerPlan("Linear", 3, 2, **(good | changes))


def test_only_convolutions_and_linear_layers_have_plans():
    with pytest.raises(InputError, match="Embedding is neither a convolution nor a linear layer"):
        LayerPlan.of(nn.Embedding(3, 4), reason="no layer")
