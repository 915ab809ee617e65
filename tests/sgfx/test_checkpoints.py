"""`sgfx.load` of plain checkpoints: state dicts of compiled models, as training scripts write them."""

import argparse
import copy
import gzip
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import models_zoo
import sgfx
from passes.layers.channel_cut import cuts
from passes.layers.grouped import Grouped
from tests.sgfx.test_files import IMAGES, Net, eliminated_net, small_net, trained


def assert_opened(into, small):
    """All that a state dict carries is there: structure, values; and the model computes the same."""
    mine, theirs = ({p: plan for p, plan in sgfx.plans(m).items() if plan.grouped} for m in (into, small))
    assert mine == theirs
    assert sgfx.plans(into).keys() == sgfx.plans(small).keys()
    for name, tensor in small.state_dict().items():
        assert torch.equal(into.state_dict()[name], tensor), name
    into.bound.copy_(small.bound)  # not persistent, so in no state dict
    for mode in (False, True):
        assert torch.equal(into.train(mode)(IMAGES), small.train(mode)(IMAGES))


def opened(content, tmp_path, into=None):
    torch.save(content, tmp_path / "checkpoint.pth")
    return sgfx.load(tmp_path / "checkpoint.pth", into=Net() if into is None else into)


@pytest.mark.parametrize(
    "content",
    [
        lambda small: small.state_dict(),
        lambda small: {"epoch": 3, "state_dict": small.state_dict(), "optimizer": {"lr": 0.1}},
        lambda small: {"model": small.state_dict(), "args": argparse.Namespace(lr=0.1, device="cpu")},
        lambda small: {"model_state_dict": small.state_dict()},
        lambda small: {"model_ema": AveragedModel(small, use_buffers=True).state_dict(), "epoch": 3},
        lambda small: {"state_dict_ema": small.state_dict()},
        lambda small: {"model": {"state_dict": small.state_dict()}},
        lambda small: {"module." + name: value for name, value in small.state_dict().items()},
        lambda small: {"module._orig_mod." + name: value for name, value in small.state_dict().items()},
        lambda small: {"state_dict": {"model." + name: value for name, value in small.state_dict().items()}},
        lambda small: torch.compile(small).state_dict(),
    ],
)
def test_files_of_training_scripts_are_opened(tmp_path, content):
    small = small_net()
    into = Net()
    assert opened(content(small), tmp_path, into) is into
    assert_opened(into, small)


@pytest.mark.parametrize("zipped", [True, False])
def test_old_files_of_torch_are_opened_whatever_their_name(tmp_path, zipped):
    torch.save(small_net().state_dict(), tmp_path / "x.safetensors", _use_new_zipfile_serialization=zipped)
    assert_opened(sgfx.load(tmp_path / "x.safetensors", into=Net()), small_net())


def test_plain_safetensors_are_opened(tmp_path):
    state = {name: value.clone().contiguous() for name, value in small_net().state_dict().items()}
    del state["twin_b.weight"]  # of tied weights such files have one
    for number, metadata in enumerate((None, {"format": "pt"})):
        save_file(state, tmp_path / f"{number}.safetensors", metadata)
        into = sgfx.load(tmp_path / f"{number}.safetensors", into=Net())
        assert into.twin_a.weight is into.twin_b.weight
        assert_opened(into, small_net())


def test_what_save_pretrained_of_transformers_writes_is_opened(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config).eval()
    small = sgfx.compile(model, groups=2, ratio=0.5, example_inputs=IMAGES)
    small.save_pretrained(tmp_path)
    into = sgfx.load(tmp_path / "model.safetensors", into=transformers.ResNetForImageClassification(config).eval())
    assert {p: x for p, x in sgfx.plans(into).items() if x.grouped} == {
        p: x for p, x in sgfx.plans(small).items() if x.grouped
    }
    assert torch.equal(into(IMAGES).logits, small(IMAGES).logits)


def test_what_was_opened_can_be_saved_trained_and_lowered_no_further(tmp_path):
    small = small_net()
    into = opened(small.state_dict(), tmp_path)
    sgfx.save(into, tmp_path / "small.safetensors")
    assert_opened(sgfx.load(tmp_path / "small.safetensors", into=Net()), small)
    into.train()(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in into.parameters())
    assert sgfx.plans(into)["conv1"].reason == "dense in the checkpoint"


def test_types_devices_modes_hooks_and_untouched_objects_of_the_model_stay(tmp_path):
    into, seen = Net().double(), []
    into.bn1.eval()
    into.block[0].register_forward_hook(lambda *_: seen.append(1))
    kept = [into.conv1.weight, into.bn1.running_mean, into.fc.bias]
    opened(small_net().state_dict(), tmp_path, into)
    assert all(a is b for a, b in zip(kept, [into.conv1.weight, into.bn1.running_mean, into.fc.bias], strict=True))
    assert (into.bn1.training, into.training, seen) == (False, True, [])
    assert into.fc.weight.dtype == torch.float64
    assert torch.equal(into.fc.weight.float(), small_net().fc.weight)


def test_models_with_fewer_channels_are_opened_where_the_same_are_eliminated_anew(tmp_path):
    small = eliminated_net()
    assert cuts(small)
    into = opened(small.state_dict(), tmp_path)
    assert_opened(into, small)
    assert cuts(into).keys() == cuts(small).keys()
    for path, cut in cuts(small).items():
        assert str(cut) == str(cuts(into)[path])
    sgfx.save(into, tmp_path / "small.safetensors")
    assert_opened(sgfx.load(tmp_path / "small.safetensors", into=Net()), small)


def test_a_network_of_the_zoo_without_the_channels_that_nobody_reads_is_opened(tmp_path):
    torch.manual_seed(0)
    small = trained(sgfx.compile(models_zoo.create("resnet20"), groups=8, ratio=0.9, eliminate=True)).eval()
    assert cuts(small)
    into = opened(small.state_dict(), tmp_path, models_zoo.create("resnet20")).eval()
    assert {n: v.shape for n, v in into.state_dict().items()} == {n: v.shape for n, v in small.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(into(x), small(x))


def test_another_head_is_loaded_first_and_replaced_then(tmp_path):
    model = trained(Net())
    model.fc = nn.Linear(8, 20)
    with pytest.raises(
        sgfx.InputError, match=r"layer 'fc': .*with 10 filters and 8 inputs, not of one with 20 and 8\. "
    ):
        opened(small_net().state_dict(), tmp_path, model)
    model = opened(small_net().state_dict(), tmp_path)
    model.fc = nn.Linear(8, 20)
    assert isinstance(model.block[0], Grouped)


def test_state_dicts_of_earlier_versions_are_opened(tmp_path):
    path = Path(__file__).parents[1] / "data" / "structure_in_buffers.pt.gz"
    content = torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=False)
    state, small = content["compiled_state"], content["compiled"]
    sizes = [(layer.dense_shape[1], layer.dense_shape[0]) for layer in small]
    layers = [nn.Conv2d(*size, 1, bias=layer.bias is not None) for size, layer in zip(sizes, small, strict=True)]
    into = opened(state, tmp_path, nn.Sequential(*layers).eval())
    torch.testing.assert_close(into(content["inputs"]), content["outputs"]["compiled"])
    assert "0.filters" in state
    for wrong in ({"0.filters": state["0.filters"][:-1]}, {"0.block_sizes": state["0.block_sizes"] * 10**12}):
        with pytest.raises(sgfx.InputError, match="layer '0': filters, inputs and block_sizes make no structure of it"):
            opened(state | wrong, tmp_path, nn.Sequential(*copy.deepcopy(layers)))


def test_a_checkpoint_of_another_structure_leaves_a_compiled_model_as_it_was(tmp_path):
    """`models_zoo.load_checkpoint` into a compiled model: all of it or nothing."""
    small, other = small_net(), trained(Net())
    with torch.no_grad():
        other.fc.weight.copy_(other.fc.weight.roll(1, 1))
    torch.manual_seed(1)
    other = sgfx.compile(other, groups=3, ratio=0.5)
    torch.save(small.state_dict(), tmp_path / "same.pth")
    state = small.state_dict() | {"fc._extra_state": other.state_dict()["fc._extra_state"]}
    torch.save(
        {name: value * 2 if "extra" not in name else value for name, value in state.items()}, tmp_path / "no.pth"
    )
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(ValueError, match=r"(?s)no\.pth does not fit this model: .*fc\.(filters|inputs) differs"):
        models_zoo.load_checkpoint(small, tmp_path / "no.pth")
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    models_zoo.load_checkpoint(small, tmp_path / "same.pth")


def test_a_checkpoint_of_an_earlier_version_goes_into_a_compiled_model_or_leaves_it_as_it_was(tmp_path):
    small = small_net()
    state = {name: value for name, value in small.state_dict().items() if "_extra" not in name}
    for path, layer in small.named_modules():
        if isinstance(layer, Grouped):
            state |= {f"{path}.{name}": getattr(layer, name) for name in Grouped.FORMER_BUFFERS}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "old.pth")
    into = small_net()
    for parameter in into.parameters():
        parameter.data.zero_()
    models_zoo.load_checkpoint(into, tmp_path / "old.pth")
    assert torch.equal(into.eval()(IMAGES), small.eval()(IMAGES))
    before = copy.deepcopy(into.state_dict())
    doubled = {name: value * 2 if value.is_floating_point() else value for name, value in state.items()}
    for change, message in (
        ({"fc.filters": state["fc.filters"].flip(0)}, r"fc\.filters differs"),
        ({"head.filters": torch.ones(1)}, "it has 1 that the model does not: head.filters"),
        ({"fc.other": torch.ones(1)}, r"Unexpected key\(s\).*fc\.other"),
    ):
        torch.save(doubled | change, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=rf"(?s)wrong\.pth .*{message}"):
            models_zoo.load_checkpoint(into, tmp_path / "wrong.pth")
        assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())
    torch.save({n: v for n, v in doubled.items() if n != "fc.inputs"}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?s)does not fit this model: .*Missing key\(s\).*fc\._extra_state"):
        models_zoo.load_checkpoint(into, tmp_path / "wrong.pth")


class Same(nn.Conv2d):
    """A convolution that pads by itself and has a norm inside."""

    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        x = nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)
        return torch.relu(self.norm(x))


@pytest.mark.parametrize("eliminate", [False, True])
def test_layers_with_code_of_their_own_are_opened_too(tmp_path, eliminate):
    def model():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 16, 3), Same(16, 24, 3), Same(24, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(24, 10)).eval()

    small = trained(sgfx.compile(model(), groups=4, ratio=0.7, eliminate=eliminate))
    assert isinstance(small[1], Grouped)
    assert bool(cuts(small)) == eliminate
    into = opened({"model": small.state_dict()}, tmp_path, model())
    assert torch.equal(into(IMAGES), small(IMAGES))
