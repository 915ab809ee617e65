"""Loading weights: what is read, what is refused and in which words, and that a refusal changes nothing."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models_zoo


def other_weights(**options: int) -> dict[str, Tensor]:
    """A state dict with the names of resnet20, and values that a new model does not have."""
    generator = torch.Generator().manual_seed(1)
    state = models_zoo.create("resnet20", **options).state_dict()
    return {key: torch.rand(value.shape, generator=generator).to(value.dtype) for key, value in state.items()}


@pytest.fixture
def model() -> nn.Module:
    return models_zoo.create("resnet20")


@pytest.fixture
def refused(model, tmp_path):
    """Check that a file is refused in the words given and that the model keeps every value."""

    def check(file: Path, match: str, error: type[Exception] = ValueError) -> None:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(error, match=match) as raised:
            models_zoo.load_checkpoint(model, file)
        assert str(file) in str(raised.value)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    return check


def assert_loaded(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_loads_files_as_the_world_makes_them(model, tmp_path, wrapper, prefix, zipped):
    state = other_weights()
    content = OrderedDict((prefix + key, value) for key, value in state.items())
    saved = {wrapper: content, "epoch": 3, "best": 0.9, "optimizer": {"state": {}}} if wrapper else content
    torch.save(saved, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    assert models_zoo.load_checkpoint(model, tmp_path / "c.pt") is model
    assert_loaded(model, state)


def test_takes_a_path_as_text(model, tmp_path):
    torch.save(other_weights(), tmp_path / "c.pt")
    assert_loaded(models_zoo.load_checkpoint(model, str(tmp_path / "c.pt")), other_weights())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_safetensors(model, tmp_path, prefix):
    from safetensors.torch import save_file

    state = other_weights()
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "c.safetensors")
    assert_loaded(models_zoo.load_checkpoint(model, tmp_path / "c.safetensors"), state)


def test_a_model_whose_own_names_begin_with_module_keeps_them(model, tmp_path):
    parallel = nn.Sequential(OrderedDict(module=model))
    torch.save({"module." + key: value for key, value in other_weights().items()}, tmp_path / "c.pt")
    models_zoo.load_checkpoint(parallel, tmp_path / "c.pt")
    assert_loaded(model, other_weights())


def test_old_files_may_lack_num_batches_tracked(model, tmp_path):
    model.bn1.num_batches_tracked.fill_(5)
    state = {key: value for key, value in other_weights().items() if not key.endswith("num_batches_tracked")}
    old = OrderedDict(state)
    old._metadata = model.state_dict()._metadata  # says that the names are those of today
    torch.save({"state_dict": old}, tmp_path / "c.pt")
    assert_loaded(models_zoo.load_checkpoint(model, tmp_path / "c.pt"), state)
    assert model.bn1.num_batches_tracked == 5


def test_loads_the_names_in_torchvisions_published_densenets(tmp_path):
    model = models_zoo.create("densenet121_cifar")
    state = {key: torch.full_like(value, 2) for key, value in model.state_dict().items()}
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d)\.")
    old = {pattern.sub(r"\1.\2.", key): value for key, value in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "c.pth")
    assert_loaded(models_zoo.load_checkpoint(model, tmp_path / "c.pth"), state)


def test_the_types_of_the_model_stay(tmp_path):
    model = models_zoo.create("resnet20").double()
    torch.save({key: value.half() for key, value in other_weights().items()}, tmp_path / "c.pt")
    models_zoo.load_checkpoint(model, tmp_path / "c.pt")
    assert model.linear.weight.dtype == torch.float64
    assert torch.equal(model.linear.weight, other_weights()["linear.weight"].half().double())


def test_no_such_file(refused, tmp_path):
    refused(tmp_path / "no.pt", r"no\.pt does not exist; give the path of a checkpoint file", FileNotFoundError)


def test_a_folder(refused, tmp_path):
    refused(tmp_path, "is a folder; give the path of a checkpoint file", FileNotFoundError)


def saved(content: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def foreign_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pt", b"epoch 1: loss 2.3\n"),
        ("page.pt", b"<!DOCTYPE html><html>404</html>"),
        ("picture.pt", b"\x89PNG\r\n\x1a\n" + bytes(99)),
        ("empty.pt", b""),
        ("zeros.pt", bytes(4096)),
        ("zip.pt", foreign_zip()),
        ("half.pt", saved(other_weights())[:50_000]),
        ("half_old.pt", saved(other_weights(), zipped=False)[:-100]),
        ("text.safetensors", b"epoch 1: loss 2.3\n"),
        ("empty.safetensors", b""),
        ("torch.safetensors", saved(other_weights())),
    ],
)
def test_not_a_checkpoint(refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, r"is not a checkpoint, or a damaged one \(.*Expected a file made by .* copy it again$")


class MakesFolder:
    """Unpickling this makes a folder: a stand-in for worse."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "old", "pickle2", "pickle5"])
def test_a_file_that_runs_code_is_refused_and_does_not_run(refused, tmp_path, form):
    evil = {"state_dict": other_weights(), "extra": MakesFolder(tmp_path / "ran")}
    if form.startswith("pickle"):
        content = pickle.dumps({"extra": evil["extra"]}, protocol=int(form[-1]))
    else:
        content = saved(evil, zipped=form == "zip")
    (tmp_path / "evil.pt").write_bytes(content)
    refused(
        tmp_path / "evil.pt", r"was refused: .* needs code.* never unpickled.* save its weights alone: torch\.save\("
    )
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_model_is_refused_by_name(model, refused, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", r"needs code \(models_zoo\.resnet_cifar\.ResNetCifar\)")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), "a Tensor"),
        ([torch.ones(3)], "a list"),
        ({}, "an empty dict"),
        ({"state_dict": {}}, "an empty dict"),
        ({"epoch": 3, "net": other_weights()}, "a dict with the entries epoch, net"),
        ({"conv1.weight": [1.0]}, r"a dict with the entries conv1\.weight"),
        ({i: torch.ones(1) for i in range(5)}, "a dict with the entries 0, 1, 2 and 2 more"),
    ],
)
def test_holds_no_state_dict(refused, tmp_path, content, found):
    torch.save(content, tmp_path / "c.pt")
    refused(
        tmp_path / "c.pt", rf"holds {found} where a state dict .* was expected, .*'model'\. Save one with torch\.save\("
    )


def test_missing_names(refused, tmp_path):
    state = other_weights()
    for key in [key for key in state if key.startswith("layer3.2")]:
        del state[key]
    torch.save(state, tmp_path / "c.pt")
    first = r"layer3\.2\.conv1\.weight, layer3\.2\.bn1\.weight, layer3\.2\.bn1\.bias and 7 more"
    refused(
        tmp_path / "c.pt", rf"it lacks 10 of the model's names: {first}\. Create the model that the file was made from"
    )


def test_unexpected_names(refused, tmp_path):
    torch.save(other_weights() | {"head.weight": torch.ones(1)}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", r"not of this model: it has 1 that the model does not: head\.weight\. Create the model")


def test_a_checkpoint_of_another_network(refused, tmp_path):
    torch.save(models_zoo.create("lenet5").state_dict(), tmp_path / "c.pt")
    refused(
        tmp_path / "c.pt",
        r"it lacks 96 of .*: bn1\.weight, .*; it has 9 that .* not: conv1\.bias, conv2\.weight, conv2\.bias and 6",
    )


def test_a_prefix_on_some_names_only_is_not_dropped(refused, tmp_path):
    state = other_weights()
    state["module.linear.bias"] = state.pop("linear.bias")
    torch.save(state, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", r"names: linear\.bias; it has 1 that the model does not: module\.linear\.bias")


def test_other_shapes(refused, tmp_path):
    torch.save(other_weights(num_classes=100), tmp_path / "c.pt")
    first = r"linear\.weight is \[100, 64\] in the file and \[10, 64\] in the model, linear\.bias is \[100\] in"
    refused(tmp_path / "c.pt", rf"does not fit this model: {first}.*Create the model with the options .*num_classes")


def test_one_wrong_shape_at_the_end_leaves_the_rest_alone(refused, tmp_path):
    torch.save(other_weights() | {"linear.bias": torch.ones(1)}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", r"fit this model: linear\.bias is \[1\] in the file and \[10\] in the model\. Create")


@pytest.mark.parametrize("values", [torch.ones(10, device="meta"), torch.ones(10).to_sparse()], ids=["meta", "sparse"])
def test_values_that_are_no_ordinary_tensor(refused, tmp_path, values):
    torch.save(other_weights() | {"linear.bias": values}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", r"values for linear\.bias that can't be copied .* Save it as a dense tensor on the CPU")
