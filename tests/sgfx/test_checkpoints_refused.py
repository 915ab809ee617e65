"""What `sgfx.load` refuses of plain checkpoints, where it sends people, and that the model is as it was then."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file

import models_zoo
import sgfx
from passes.layers.channel_cut import cuts
from tests.sgfx.test_checkpoints import opened
from tests.sgfx.test_files import LeakyNet, Net, assert_untouched, eliminated_net, small_net, snapshot, trained


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
    def fail(small):
        raise sgfx.InputError("the model is not what it was")

    monkeypatch.setattr("sgfx.files.checkpoints.remove_unread_filters", fail)
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
