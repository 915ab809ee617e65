"""Classes of packages that need not be there are known by themselves, not by their names."""

from torch import nn
from torchvision.ops import misc

from passes.layers.known.norms import is_frozen_norm, is_norm
from passes.layers.known.optional_classes import class_of
from passes.options.checks import check_model


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A user's own of torchvision's name."""


class DataParallel(nn.Sequential):
    """A user's own of torch's name."""


def test_a_class_is_found_where_its_module_was_imported():
    assert class_of("torchvision.ops.misc", "FrozenBatchNorm2d") is misc.FrozenBatchNorm2d
    assert class_of("torchvision.ops.misc", "NoSuchNorm") is None
    assert class_of("torchvision.ops.misc", "torch") is None  # a module
    assert class_of("no.such.package", "FrozenBatchNorm2d") is None


def test_a_class_of_the_same_name_is_another():
    assert is_frozen_norm(misc.FrozenBatchNorm2d(2))
    assert not is_frozen_norm(FrozenBatchNorm2d(2))
    assert not is_norm(FrozenBatchNorm2d(2))
    check_model(DataParallel(nn.Linear(2, 2)))
