"""`sgfx.save` and `sgfx.load`: exact round trips, and nothing half-written."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models import detection

import models_zoo
import sgfx
from passes.layers.channel_cut import cuts
from passes.layers.grouped import Grouped

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A net with a tied weight, a buffer that is not persistent, and one that is no contiguous tensor."""

    def __init__(self, width=8, stride=1, bound=6.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1), nn.ReLU(), nn.Conv2d(width, width, 1))
        self.fc = nn.Linear(width, 10)
        self.twin_a, self.twin_b = nn.Linear(10, 10), nn.Linear(10, 10)
        self.twin_b.weight = self.twin_a.weight
        self.register_buffer("bound", torch.tensor(bound), persistent=False)
        self.register_buffer("mix", torch.randn(10, 10).t())

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.fc((y.clamp(max=float(self.bound)) + self.block(y).mean((2, 3), keepdim=True)).mean((2, 3)))
        return self.twin_b(self.twin_a(y)) @ self.mix


class LeakyNet(Net):
    """Another class with the very same tensors."""


class Untied(Net):
    """The same names, but two tensors where `Net` has one."""

    def __init__(self):
        super().__init__()
        self.twin_b.weight = nn.Parameter(self.twin_b.weight.detach().clone())


Untied.__qualname__ = "Net"


def small_net(**options):
    torch.manual_seed(0)
    return sgfx.compile(trained(Net(**options)), groups=3, ratio=0.5)


def trained(model):
    """Move the norms' statistics and the rest away from what the constructor makes."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand(tensor.shape))
    return model


def everything(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same(loaded, small):
    assert sgfx.plans(loaded) == sgfx.plans(small)
    mine, theirs = everything(loaded), everything(small)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert [type(m) for m in loaded.modules()] == [type(m) for m in small.modules()]


def snapshot(model):
    return {name: (id(tensor), tensor.clone()) for name, tensor in everything(model).items()}, list(model.modules())


def assert_untouched(model, before):
    tensors, modules = before
    assert list(model.modules()) == modules
    assert {name: id(tensor) for name, tensor in everything(model).items()} == {n: i for n, (i, _) in tensors.items()}
    assert all(torch.equal(tensor, tensors[name][1]) for name, tensor in everything(model).items())
    assert sgfx.plans(model) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_round_trip_is_exact(tmp_path, dtype):
    small = small_net().to(dtype)
    sgfx.save(small, str(tmp_path / "small.safetensors"))
    into = Net().to(dtype)
    assert sgfx.load(tmp_path / "small.safetensors", into=into) is into
    assert_same(into, small)
    assert into.twin_a.weight is into.twin_b.weight
    images = IMAGES.to(dtype)
    for mode in (False, True):
        assert torch.equal(into.train(mode)(images), small.train(mode)(images))


@pytest.mark.parametrize("name", models_zoo.list())
def test_every_network_of_the_zoo_comes_back(tmp_path, name):
    if name in ("resnet110", "densenet201", "resnet56", "resnet44", "resnet32"):
        pytest.skip("the same code as a smaller one")
    torch.manual_seed(0)
    small = sgfx.compile(models_zoo.create(name), groups=4, ratio=0.7)
    sgfx.save(small, tmp_path / "small.safetensors")
    assert_same(sgfx.load(tmp_path / "small.safetensors", into=models_zoo.create(name)), small)


def test_a_compiled_backbone_comes_back_inside_its_detector(tmp_path):
    def detector():
        return detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)

    torch.manual_seed(0)
    small = detector()
    small.backbone = sgfx.compile(small.backbone, ratio=0.5)
    sgfx.save(small, tmp_path / "detector.safetensors")
    loaded = sgfx.load(tmp_path / "detector.safetensors", into=detector())
    assert_same(loaded, small)
    images = [torch.rand(3, 64, 64)]
    for mine, theirs in zip(loaded.eval()(images), small.eval()(images), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def eliminated_net():
    torch.manual_seed(0)
    return sgfx.compile(trained(Net()), groups=2, ratio=0.8, eliminate=True, overrides={"conv1": {"ratio": 0.6}})


def test_a_model_with_fewer_channels_comes_back_with_its_cuts(tmp_path):
    small = eliminated_net()
    assert "block.0" in cuts(small)
    sgfx.save(small, tmp_path / "small.safetensors")
    into = sgfx.load(tmp_path / "small.safetensors", into=Net())
    assert_same(into, small)
    assert list(cuts(into)) == list(cuts(small))
    for path, cut in cuts(small).items():
        for mine, theirs in ((cuts(into)[path].outputs, cut.outputs), (cuts(into)[path].inputs, cut.inputs)):
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)
    sgfx.save(into, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()
    for mode in (False, True):
        assert torch.equal(into.train(mode)(IMAGES), small.train(mode)(IMAGES))


def test_training_goes_on_alike_after_loading(file):
    models = small_net(), sgfx.load(file, into=Net())
    for model in models:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(IMAGES), torch.arange(4)).backward()
            optimizer.step()
    assert_same(models[1], models[0])
    assert not torch.equal(models[1].fc.weight, small_net().fc.weight)


def test_the_model_keeps_its_modes_hooks_flags_and_untouched_objects(file):
    into = Net()
    into.bn1.eval()
    into.block[0].weight.requires_grad_(False)
    seen = []
    into.block[0].register_forward_hook(lambda *_: seen.append(1))
    kept = [into.conv1.weight, into.bn1.running_mean, into.fc.bias]
    sgfx.load(file, into=into)
    assert all(a is b for a, b in zip(kept, [into.conv1.weight, into.bn1.running_mean, into.fc.bias], strict=True))
    assert (into.bn1.training, into.training) == (False, True)
    assert not into.block[0].weight.requires_grad
    assert seen == []
    into(IMAGES)
    assert seen == [1]


def test_a_file_saved_again_is_the_same(file, tmp_path):
    sgfx.save(sgfx.load(file, into=Net()), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_weights_are_stored_packed_and_the_structure_is_plain_json(file):
    with safe_open(file, "pt") as content:
        structure = json.loads(content.metadata()["sgfx"])
    assert structure["format"] == 2
    plan = sgfx.plans(small_net())["block.0"]
    assert structure["plans"]["block.0"]["labels"] == plan.labels.tolist()
    assert structure["plans"]["conv1"]["reason"] == "first convolution"
    assert load_file(file)["block.0.weight"].shape == (plan.connections, 3, 3)


def test_a_cache_that_is_no_part_of_the_state_does_not_stand_in_the_way(tmp_path):
    small = small_net()
    small.register_buffer("cache", torch.zeros(7), persistent=False)
    sgfx.save(small, tmp_path / "small.safetensors")
    assert not hasattr(sgfx.load(tmp_path / "small.safetensors", into=Net()), "cache")


def test_buffers_that_are_not_persistent_come_back_too(tmp_path):
    sgfx.save(small_net(bound=0.25), tmp_path / "small.safetensors")
    assert sgfx.load(tmp_path / "small.safetensors", into=Net()).bound == small_net(bound=0.25).bound


# What is refused on saving.


def masked():
    pruner = sgfx.Pruner(Net(), ratio=0.5, step=0.25)
    next(iter(pruner))
    return pruner.model


def with_extra_state():
    class Counter(nn.ReLU):
        def get_extra_state(self):
            return {"calls": 3}

    small = small_net()
    small.block[1] = Counter()
    return small


def with_a_layer_put_back():
    small = small_net()
    small.fc = nn.Linear(8, 10)
    small.fc._sgfx_plan = sgfx.plans(small_net())["fc"]
    return small


def with_a_sparse_buffer():
    small = small_net()
    small.mix = torch.eye(10).to_sparse()
    return small


def with_a_tensor_of_another_class():
    small = small_net()
    small.mix = TwoTensor(torch.eye(10), torch.eye(10))
    return small


def with_a_meta_buffer():
    small = small_net()
    small.mix = torch.eye(10, device="meta")
    return small


def with_a_frozen_part():
    small = small_net()
    small.frozen = sgfx.freeze(small_net(), IMAGES, strategy="library")
    return small


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            with_a_tensor_of_another_class,
            "'mix' is a TwoTensor, which a file of plain tensors can't hold: save the model",
        ),
        (with_a_meta_buffer, "'mix' is on the meta device; a file holds values"),
        (with_a_frozen_part, "small is a frozen model: save the one that it was made from"),
        (Net, "has no layer plans: save what sgfx.compile or Pruner.lower returned"),
        (masked, "is masked, between two pruning steps: save what Pruner.lower returns"),
        (with_extra_state, r"module 'block.1' \(Counter\) keeps extra state"),
        (with_a_layer_put_back, r"module 'fc' \(Linear\) does not agree with its layer plan"),
        (with_a_sparse_buffer, "'mix' is torch.sparse_coo"),
    ],
)
def test_models_that_a_file_cant_hold_are_refused(tmp_path, make, message):
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.save(make(), tmp_path / "small.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_distributed_model_is_told_to_gather_its_parts(tmp_path):
    from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        small, mesh = small_net(), DeviceMesh("cpu", [0])
        for name in ("weight", "bias"):
            part = distribute_tensor(getattr(small.fc, name).detach(), mesh, [Replicate()])
            setattr(small.fc, name, nn.Parameter(part))
        with pytest.raises(sgfx.InputError, match=r"'fc.weight' is a DTensor, .*: gather the parts of the distributed"):
            sgfx.save(small, tmp_path / "small.safetensors")
    finally:
        torch.distributed.destroy_process_group()
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cant_be_written_are_refused(tmp_path):
    with pytest.raises(sgfx.InputError, match="is a folder; give the path of a file"):
        sgfx.save(small_net(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing; make it first"):
        sgfx.save(small_net(), tmp_path / "missing" / "small.safetensors")
    with pytest.raises(sgfx.InputError, match=r"would be no onnx file but a safetensors one: use sgfx.export"):
        sgfx.save(small_net(), tmp_path / "small.onnx")
    with pytest.raises(TypeError):
        sgfx.save(small_net(), 3)
    assert list(tmp_path.iterdir()) == []


# Saving is atomic.


def test_an_error_while_writing_leaves_the_earlier_file(file, monkeypatch):
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        sgfx.save(small_net(), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_an_earlier_file_is_replaced_and_a_link_followed(file):
    link = file.with_name("link.safetensors")
    link.symlink_to(file)
    small = small_net(bound=0.5)
    sgfx.save(small, link)
    assert link.is_symlink()
    assert_same(sgfx.load(file, into=Net()), small)
    assert {each.name for each in file.parent.iterdir()} == {file.name, link.name}


def test_permissions_are_those_of_any_new_file(file):
    other = file.with_name("other")
    other.touch()
    assert file.stat().st_mode == other.stat().st_mode


def test_a_killed_process_never_leaves_half_a_file(tmp_path):
    program = """
import sys, torch, sgfx, models_zoo
torch.set_num_threads(1)
torch.manual_seed(0)
small = sgfx.compile(models_zoo.create("resnet20"), groups=4, ratio=0.5)
index = 0
while True:
    small.conv1.weight.data.fill_(index)
    sgfx.save(small, sys.argv[1])
    if not index:
        print(flush=True)
    index += 1
"""
    path = tmp_path / "small.safetensors"
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            for attempt in range(12):
                process.send_signal(signal.SIGSTOP)  # wherever it stands, what has the name is whole
                loaded = sgfx.load(path, into=models_zoo.create("resnet20"))
                assert len(loaded.conv1.weight.unique()) == 1
                process.send_signal(signal.SIGCONT)
                time.sleep(0.007 * (attempt + 1))
        finally:
            process.kill()
    assert isinstance(sgfx.load(path, into=models_zoo.create("resnet20")).linear, Grouped)
    assert len([each for each in tmp_path.iterdir() if not each.name.startswith(".")]) == 1


def test_deep_copies_save_alike(file):
    again = file.with_name("again.safetensors")
    sgfx.save(copy.deepcopy(small_net()), again)
    assert again.read_bytes() == file.read_bytes()


# What happens to a file during and after loading.


def test_a_loaded_model_has_nothing_of_its_file(file):
    small, loaded = small_net(), sgfx.load(file, into=Net())
    with file.open("r+b") as opened:  # in place: a mapping would show it
        opened.write(b"\xff" * file.stat().st_size)
    assert_same(loaded, small)
    os.truncate(file, 0)  # and here it would kill the process
    assert torch.equal(loaded.eval()(IMAGES), small.eval()(IMAGES))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(file) not in maps.read_text()
    loaded.block[0].weight.data.zero_()  # and its tensors can be written to


@pytest.mark.parametrize("change", [lambda file: os.truncate(file, 100), lambda file: file.write_bytes(bytes(10**6))])
def test_a_file_that_changes_while_it_is_read_is_refused(file, monkeypatch, change):
    opening = os.fstat

    def changed_after(descriptor):
        status = opening(descriptor)
        change(file)
        return status

    monkeypatch.setattr(os, "fstat", changed_after)
    with pytest.raises(sgfx.InputError, match="was written to while it was read; load it again when it is whole"):
        sgfx.load(file, into=Net())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_file_is_neither_waited_for_nor_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path, kind in ((tmp_path / "fifo", "FIFO"), (tmp_path / "socket", "socket"), ("/dev/zero", "device")):
            with pytest.raises(sgfx.InputError, match=f"is a {kind}; give the path of a file that sgfx.save wrote"):
                sgfx.load(path, into=Net())
