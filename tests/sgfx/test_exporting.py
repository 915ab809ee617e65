"""`sgfx.export`: programs of plain operations that compute what the model does, without this package."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import sgfx
from passes.layers.grouped import Grouped

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FORMS = ["dense", "blocks"]
SUFFIXES = [".pt2", ".onnx"]


class Net(nn.Module):
    """Convolutions with every kind of geometry, a norm, dropout and a residual sum."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False)
        )
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding="valid")
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.down(y + self.block(y)).mean((2, 3))
        return self.fc(F.dropout(y, 0.5, self.training))


def compiled(model=None, **options):
    torch.manual_seed(0)
    model = Net() if model is None else model
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.uniform_(-1, 1)
                norm.running_var.uniform_(0.5, 2)
    return sgfx.compile(model, **{"groups": 3, "ratio": 0.6, **options})


def run(path, *inputs):
    if path.suffix == ".pt2":
        outputs = torch.export.load(path).module()(*inputs)
        return list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", FORMS)
def test_a_file_computes_what_the_model_does(tmp_path, suffix, form):
    small = compiled()
    path = tmp_path / f"small{suffix}"
    written = sgfx.export(small, path, IMAGES, form=form)
    expected = small.eval()(IMAGES).detach()
    difference = float((run(path, IMAGES)[0] - expected).abs().max())
    assert difference == written.max_difference <= 1e-6
    assert written.max_output == float(expected.abs().max())
    assert (written.path, written.form, written.size) == (path, form, path.stat().st_size)
    assert f" MB, form '{form}', outputs differ by at most" in str(written)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("form", FORMS)
def test_the_batch_varies_on_request_even_from_an_example_of_one(tmp_path, suffix, form):
    small = compiled().eval()
    path = tmp_path / f"small{suffix}"
    sgfx.export(small, path, IMAGES[:1], form=form, dynamic_shapes=({0: "batch"},))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(run(path, images)[0], small(images).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_group_without_inputs_yields_its_bias(tmp_path, suffix):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False))
    with torch.no_grad():
        for layer in (model[1], model[2]):
            layer.weight[:4] *= 1e-3
    small = compiled(model, groups=2, ratio=0.5)
    assert (4, 0) in sgfx.plans(small)["1"].block_sizes
    sgfx.export(small, tmp_path / f"small{suffix}", IMAGES, form="blocks", dynamic_shapes=({0: Dim("batch")},))
    torch.testing.assert_close(run(tmp_path / f"small{suffix}", IMAGES)[0], small(IMAGES).detach())


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_other_dimensions(tmp_path, dims, form):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    small = compiled(nn.Sequential(conv(3, 8, 3), conv(8, 8, 2)))
    x = torch.randn(2, 3, *[6] * dims)
    written = sgfx.export(small, tmp_path / "small.onnx", x, form=form)
    assert written.max_difference < 1e-6


class Pyramid(nn.Module):
    """As detection backbones do, it returns an ordered dict."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.fine, self.coarse = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x):
        x = self.body(x)
        return OrderedDict(z_fine=self.fine(x), a_coarse=self.coarse(x))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_dict_of_outputs_keeps_its_order(tmp_path, suffix):
    small = compiled(Pyramid())
    path = tmp_path / f"small{suffix}"
    sgfx.export(small, path, IMAGES)
    for mine, theirs in zip(run(path, IMAGES), small(IMAGES).values(), strict=True):
        torch.testing.assert_close(mine, theirs.detach())
    if suffix == ".pt2":
        assert list(torch.export.load(path).module()(IMAGES)) == ["z_fine", "a_coarse"]


def test_a_pt2_file_runs_where_this_package_is_not(tmp_path):
    small = compiled().eval()
    for form in FORMS:
        sgfx.export(small, tmp_path / f"{form}.pt2", IMAGES, form=form)
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    program = """
import sys
for name in ("sgfx", "passes", "models_zoo", "tests", "torchvision"):
    sys.modules[name] = None  # importing it fails
import numpy, torch
for form in ("dense", "blocks"):
    module = torch.export.load(form + ".pt2").module()
    numpy.save(form + ".npy", module(torch.from_numpy(numpy.load("images.npy"))).detach().numpy())
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    for form in FORMS:
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / f"{form}.npy")), small(IMAGES).detach())


@pytest.mark.parametrize("form", FORMS)
def test_files_hold_plain_operations_and_no_places_on_this_machine(tmp_path, form):
    sgfx.export(compiled(), tmp_path / "small.onnx", IMAGES, form=form)
    sgfx.export(compiled(), tmp_path / "small.pt2", IMAGES, form=form)
    model = onnx.load(tmp_path / "small.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert len(model.functions) == 0
    nodes = torch.export.load(tmp_path / "small.pt2").graph.nodes
    targets = {node.target for node in nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert {target.namespace for target in targets} == {"aten"}
    here = sgfx.__file__.rpartition("sgfx")[0].encode()
    assert here not in (tmp_path / "small.onnx").read_bytes()
    assert here not in (tmp_path / "small.pt2").read_bytes()


def test_blocks_are_as_small_as_the_weights_and_dense_is_not(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3))
    small = sgfx.compile(model, groups=4, ratio=0.9, eliminate=True)  # as export does it
    sizes = {form: sgfx.export(small, tmp_path / f"{form}.onnx", IMAGES, form=form).size for form in FORMS}
    packed = 4 * sum(p.numel() for p in small.parameters())
    full = 4 * sum(layer.out_channels * (9 * layer.in_channels + 1) for layer in small)
    assert packed < sizes["blocks"] < packed + 20_000
    assert full < sizes["dense"] < full + 20_000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_live_model_is_neither_run_nor_changed(tmp_path, suffix):
    small = compiled()
    small.bn1.eval()
    fired = []
    small.down.register_forward_hook(lambda *_: fired.append(1))
    modules, modes = list(small.modules()), [module.training for module in small.modules()]
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    images = IMAGES.clone().requires_grad_()
    state = torch.get_rng_state()
    written = sgfx.export(small, tmp_path / f"small{suffix}", images)
    assert written.hooks_left_out == ("down",)
    assert str(written).endswith("without the hooks of 'down'")
    assert fired == []
    assert list(small.modules()) == modules
    assert [module.training for module in small.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.state_dict().items())
    assert all(parameter.requires_grad for parameter in small.parameters())
    assert {layer.form for layer in small.modules() if isinstance(layer, Grouped)} == {"dense"}
    assert torch.equal(torch.get_rng_state(), state)
    assert images.grad is None
    assert torch.equal(images.detach(), IMAGES)


@pytest.mark.parametrize("form", FORMS)
def test_what_nobody_reads_is_not_in_the_file(tmp_path, form):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
    small = compiled(model, groups=2, ratio=0.9)
    sgfx.export(small, tmp_path / "small.pt2", IMAGES, form=form)
    state = torch.export.load(tmp_path / "small.pt2").state_dict
    read = int(sgfx.plans(small)["3"].keep.any(0).sum())
    assert read < 20
    assert state["0.weight"].shape == (read, 3, 3, 3)
    assert state["1.weight"].shape == (read,)
    assert small[0].weight.shape == (64, 3, 3, 3)


def test_a_model_that_was_never_compiled_is_exported_as_it_is(tmp_path):
    torch.manual_seed(0)
    assert sgfx.export(Net(), tmp_path / "dense.pt2", IMAGES).max_difference == 0


# What is refused. Nothing is written.


class AtRandom(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(10)


class Branching(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class OneOnly(Net):
    def forward(self, x):
        return super().forward(x.view(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (AtRandom, {}, "was not written: an output differs from the model's by .* compute at random in eval mode"),
        (Branching, {}, r"torch.export can't export Branching: .*\nExport a part of it, such as model.backbone"),
        (
            OneOnly,
            {"dynamic_shapes": ({0: Dim("batch")},)},
            r"can't export OneOnly: Constraints violated \(batch\)! - .*specialized.* Suggested fixes: batch = 2\n"
            "Export a part of it, such as model.backbone, or change dynamic_shapes",
        ),
        (Net, {"dynamic_shapes": {"y": {0: "batch"}}}, r"top-level keys must be the arg names \['x'\] of `inputs`"),
        (Net, {"opset": 20}, r"opset are for .onnx files: a .pt2 file has none"),
        (Net, {"form": "sparse"}, "form must be 'dense', 'blocks' or None, not 'sparse'"),
    ],
)
def test_models_and_options_that_cant_be_exported_are_refused(tmp_path, make, options, message):
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.export(make(), tmp_path / "small.pt2", IMAGES, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.create_unbacked_symint. is deprecated")  # torchvision's call
def test_operations_of_other_packages_are_refused(tmp_path):
    from torchvision.ops import nms

    class Suppressing(Net):
        def forward(self, x):
            return nms(super().forward(x)[:, :4].abs(), torch.ones(2), 0.5)

    with pytest.raises(sgfx.InputError, match=r"needs operations that torch alone does not have: \['torchvision.nms"):
        sgfx.export(Suppressing(), tmp_path / "small.pt2", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_paths_and_inputs_are_checked(tmp_path):
    small = compiled()
    with pytest.raises(sgfx.InputError, match=r"small must end in .pt2 \(torch.export\) or .onnx"):
        sgfx.export(small, tmp_path / "small", IMAGES)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*none; make it first"):
        sgfx.export(small, tmp_path / "none" / "small.pt2", IMAGES)
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(sgfx.InputError, match=r"folder.pt2 is a folder"):
        sgfx.export(small, tmp_path / "folder.pt2", IMAGES)
    with pytest.raises(sgfx.InputError, match=r"example_inputs of shape \[2, 4, 8, 8\] do not fit the model in eval"):
        sgfx.export(small, tmp_path / "small.pt2", torch.zeros(2, 4, 8, 8))
    with pytest.raises(TypeError, match=r"example_inputs must be a tensor, a tuple of positional"):
        sgfx.export(small, tmp_path / "small.pt2", None)
    with pytest.raises(TypeError, match=r"dynamic_shapes must be a tuple or dict with an entry for each input, not 3"):
        sgfx.export(small, tmp_path / "small.pt2", IMAGES, dynamic_shapes=3)


def test_a_missing_exporter_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(sgfx.InputError, match=r"writing ONNX needs onnxruntime: pip install 'sgfx\[onnx\]'"):
        sgfx.export(compiled(), tmp_path / "small.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_stays_after_an_error(tmp_path):
    path = tmp_path / "small.pt2"
    path.write_bytes(b"earlier")
    with pytest.raises(sgfx.InputError, match="was not written"):
        sgfx.export(AtRandom(), path, IMAGES)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]
