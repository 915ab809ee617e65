"""ultralytics' networks, compiled: they agree with their masked twins, and `fuse` is told to leave them alone."""

from functools import partial

import pytest
import torch

import sgfx
from tests.tools.yolo import NETWORKS, offline, yaml_of

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture(autouse=True)
def without_network(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path)


def network(version):
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    return DetectionModel(yaml_of(version), verbose=False).eval()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("version", NETWORKS)
def test_networks_of_each_version_agree_with_their_masked_twins(version, tmp_path):
    dense = network(version)
    small = sgfx.compile(dense, groups=4, ratio=0.5, example_inputs=IMAGES)
    assert sgfx.verify(dense, small, IMAGES).max_error == 0
    assert sum(plan.grouped for plan in sgfx.plans(small).values()) > 10
    with torch.no_grad():
        expected = small.eval()(IMAGES)[0].clone()
        small.is_fused = partial(bool, True)
        small.fuse(verbose=False)  # what val, predict and export do
        assert torch.equal(small(IMAGES)[0], expected)
        sgfx.save(small, tmp_path / "small.safetensors")
        loaded = sgfx.load(tmp_path / "small.safetensors", into=network(version))
        assert torch.equal(loaded.eval()(IMAGES)[0], expected)


def test_fuse_says_that_a_packed_weight_is_no_dense_one():
    small = sgfx.compile(network("v8"), groups=4, ratio=0.5, example_inputs=IMAGES)
    with pytest.raises(RuntimeError, match=r"The size of tensor a \(\d+\) must match"):  # the words on the page
        small.fuse(verbose=False)
