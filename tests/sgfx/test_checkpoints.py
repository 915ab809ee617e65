"""`sgfx.load` of plain checkpoints: state dicts of compiled models, as training scripts write them."""

import argparse
import copy
import gzip
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import models_zoo
import sgfx
from passes.cut import cuts
from passes.layers.grouped import Grouped
from tests.sgfx.test_files import (
    IMAGES,
    LeakyNet,
    Net,
    assert_untouched,
    eliminated_net,
    small_net,
    snapshot,
    trained,
)


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
    sizes = [(layer._dense_shape[1], layer._dense_shape[0]) for layer in small]
    layers = [nn.Conv2d(*size, 1, bias=layer.bias is not None) for size, layer in zip(sizes, small, strict=True)]
    into = opened(state, tmp_path, nn.Sequential(*layers).eval())
    torch.testing.assert_close(into(content["inputs"]), content["outputs"]["compiled"])
    assert "0.filters" in state
    for wrong in ({"0.filters": state["0.filters"][:-1]}, {"0.block_sizes": state["0.block_sizes"] * 10**12}):
        with pytest.raises(sgfx.InputError, match="layer '0': filters, inputs and block_sizes make no structure of it"):
            opened(state | wrong, tmp_path, nn.Sequential(*copy.deepcopy(layers)))


# What is refused: the model is as it was.


def refused(content, tmp_path, message, into=None):
    into = Net() if into is None else into
    before = snapshot(into)
    with pytest.raises(sgfx.InputError, match=message):
        opened(content, tmp_path, into)
    assert_untouched(into, before)


def test_checkpoints_of_dense_models_are_sent_to_where_they_belong(tmp_path):
    message = (
        r"checkpoint.pth does not fit Net: .*weights of a dense model\. Load them with models_zoo\.load_checkpoint"
    )
    refused(trained(Net()).state_dict(), tmp_path, message)
    save_file({"weight": torch.zeros(3)}, tmp_path / "dense.safetensors")
    with pytest.raises(
        sgfx.InputError, match=r"not one that sgfx.save wrote, and has no structure: it holds the weights"
    ):
        sgfx.load(tmp_path / "dense.safetensors", into=Net())


def test_checkpoints_of_masked_models_are_sent_to_the_pruner(tmp_path):
    pruner = sgfx.Pruner(Net(), ratio=0.5, step=0.25)
    next(iter(pruner))
    message = "layer 'block.0' is masked, between two pruning steps. Make the Pruner anew, and load its state"
    refused(pruner.model.state_dict(), tmp_path, message)
    refused(pruner.state_dict(), tmp_path, message)
    state = {name: value for name, value in pruner.model.state_dict().items() if "_extra" not in name}
    refused(state | {"block.0.mask": pruner.model.block[0].mask}, tmp_path, message)


def test_where_other_channels_were_eliminated_than_would_be_now_a_file_of_sgfx_is_needed(tmp_path):
    message = r"other channels of layer 'block\.0' were eliminated than would be now, without example_inputs\. A plain"
    for change in (lambda outputs: (outputs + 1) % 8, lambda outputs: outputs[1:], lambda outputs: None):
        small = eliminated_net()
        cut = cuts(small)["block.0"]
        outputs = change(cut.outputs)
        outputs = outputs if outputs is None else outputs.sort().values
        small.block[0].note_cut(sgfx.plans(small)["block.0"], outputs, cut.inputs)
        refused(small.state_dict(), tmp_path, message)
    small.block[0].note_cut(sgfx.plans(small)["block.0"], torch.tensor([9]), None)
    refused(small.state_dict(), tmp_path, "layer 'block.0': its outputs that remain are not ascending numbers below 8")
    state = eliminated_net().state_dict()
    wider = torch.cat([state["bn1.weight"], torch.ones(1)])
    refused(
        state | {"bn1.weight": wider}, tmp_path, r"'bn1.weight' differ in shape \(\[8\] in the file and \[7\] in the"
    )


def test_what_cant_be_eliminated_anew_is_refused(tmp_path, monkeypatch):
    def fail(small, example_inputs):
        raise sgfx.InputError("the model is not what it was")

    monkeypatch.setattr("sgfx.checkpoints.eliminated", fail)
    message = (
        "channels were eliminated, which can't be done anew: the model is not what it was. A plain checkpoint does"
    )
    refused(eliminated_net().state_dict(), tmp_path, message)


def changed(**values):
    return small_net().state_dict() | values


def without(*names):
    return {name: value for name, value in small_net().state_dict().items() if name not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: without("fc.bias"), r"it lacks 'fc.bias'\. Make a dense model of the class and options"),
        (lambda: without("fc.weight"), r"it lacks 'fc.weight'"),
        (
            lambda: without("fc._extra_state"),
            r"'fc.weight' differ in shape \(\[\d+, 1\] in the file and \[10, 8\] in the",
        ),
        (lambda: changed(head=torch.ones(1)), "it has 'head', which the model has not"),
        (lambda: changed(**{"head._extra_state": torch.ones(1)}), r"the model lacks layer 'head'\. Make a dense model"),
        (lambda: changed(**{"bn1._extra_state": torch.ones(1)}), "layer 'bn1': a BatchNorm2d can't be regrouped"),
        (lambda: changed(**{"fc._extra_state": torch.ones(9)}), "layer 'fc': _extra_state can't be read"),
        (lambda: changed(**{"fc.bias": torch.ones(3)}), r"'fc.bias' differ in shape \(\[3\] in the file and \[10\]"),
        (lambda: changed(**{"fc.weight": torch.ones(3, 1)}), r"'fc.weight' differ in shape"),
        (lambda: changed(**{"fc.bias": torch.ones(10).to_sparse()}), r"(?s)its values can't be loaded: .*fc\.bias"),
        (lambda: changed(**{"fc.bias": torch.ones(10, device="meta")}), "fc.bias"),
        (
            lambda: {"epoch": 3, "net": small_net().state_dict()},
            "holds a dict with the entries epoch, net where a state",
        ),
        (lambda: {"state_dict": {}}, "holds an empty dict where a state dict"),
        (lambda: [1, 2], "holds a list where a state dict"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, content, message):
    refused(content(), tmp_path, message)


def test_another_model_is_refused(tmp_path):
    refused(small_net().state_dict(), tmp_path, "layer 'block.0': .* not of one with 16 and 16", Net(width=16))
    refused(small_net().state_dict(), tmp_path, "the model lacks layer", models_zoo.create("lenet5"))
    opened(small_net().state_dict(), tmp_path, LeakyNet())  # of another class: a state dict doesn't say of which


class Evil:
    """Unpickling this makes a folder: a stand-in for worse."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    evil = {"state_dict": small_net().state_dict(), "args": argparse.Namespace(x=Evil(tmp_path / "ran"))}
    refused(evil, tmp_path, "was refused: it is not made of weights alone but needs code")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(evil))
    with pytest.raises(sgfx.InputError, match="was refused: it is not made of weights alone but needs code"):
        sgfx.load(tmp_path / "plain.pth", into=Net())
    assert not (tmp_path / "ran").exists()
    message = (
        r"needs code \(tests.sgfx.test_files.Net\).*save its weights alone: torch.save\(model.state_dict\(\), path\)"
    )
    refused(small_net(), tmp_path, message)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, share):
    torch.save(small_net().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: int(share * len(content))])
    into = Net()
    before = snapshot(into)
    with pytest.raises(sgfx.InputError, match=r"is not a checkpoint, or a damaged one|is truncated, damaged or no"):
        sgfx.load(tmp_path / "half.pth", into=into)
    assert_untouched(into, before)


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
