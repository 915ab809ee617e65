"""`sgfx.export`: sizes that vary, names, opsets, and nothing printed on the way to an error."""

import sys

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import sgfx
from tests.sgfx.test_exporting import IMAGES, SUFFIXES, Net, compiled, run


class Two(nn.Module):
    """Two inputs in a tuple and one beside them, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, pair, bias):
        y = self.conv(self.stem(pair[0] + pair[1]))
        return F.max_pool2d(y, 2), self.fc(y.mean((2, 3))) + bias


PAIR = (torch.randn(1, 3, 8, 12), torch.randn(1, 3, 8, 12)), torch.randn(1, 4)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "shapes",
    [
        {"pair": ({0: "batch", 2: "height"},) * 2, "bias": {0: "batch"}},
        ((("batch", None, "height", None),) * 2, {0: "batch"}),
        (({0: Dim.AUTO, 2: Dim.AUTO},) * 2, {0: Dim.AUTO}),
        (({0: Dim("batch"), 2: 4 * Dim("quarter", min=2)},) * 2, {0: Dim("batch")}),
        (({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},) * 2, {0: Dim.DYNAMIC}),
    ],
)
def test_sizes_vary_as_torch_export_and_torch_onnx_say_it(tmp_path, suffix, shapes):
    small = compiled(Two()).eval()
    path = tmp_path / f"small{suffix}"
    sgfx.export(small, path, PAIR, dynamic_shapes=shapes)
    for batch, height in ((2, 8), (1, 8), (3, 12), (5, 24)):
        pair = torch.randn(batch, 3, height, 12), torch.randn(batch, 3, height, 12)
        bias = torch.randn(batch, 4)
        expected = small(pair, bias)
        loaded = torch.export.load(path).module() if suffix == ".pt2" else None
        found = loaded(pair, bias) if loaded else run(path, *pair, bias)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


def axes(values):
    return [(v.name, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]) for v in values]


def test_onnx_files_have_the_names_and_the_opset_that_were_asked_for(tmp_path):
    path = tmp_path / "small.onnx"
    sgfx.export(
        compiled(Two()),
        path,
        PAIR,
        opset=20,
        input_names=["left", "right", "offset"],
        output_names=("pooled", "logits"),
        dynamic_shapes={"pair": ({0: "batch"}, {0: "batch"}), "bias": {0: "batch"}},
    )
    model = onnx.load(path)
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 20)]
    assert axes(model.graph.input) == [
        ("left", ["batch", 3, 8, 12]),
        ("right", ["batch", 3, 8, 12]),
        ("offset", ["batch", 4]),
    ]
    assert axes(model.graph.output) == [("pooled", ["batch", 8, 4, 6]), ("logits", ["batch", 4])]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_names": ["a"]}, ValueError, r"input_names has 1 names for 3 input tensors: \['a'\]"),
        ({"output_names": ["a", "b", "c"]}, ValueError, r"output_names has 3 names for 2 output tensors"),
        ({"input_names": ["a", "b", "b"]}, ValueError, "input_names and output_names hold 'b' twice"),
        ({"input_names": list("abc"), "output_names": ["c", "d"]}, ValueError, "output_names hold 'c' twice"),
        ({"input_names": "abc"}, TypeError, "input_names must be a list of names, not 'abc'"),
        ({"output_names": ["a", ""]}, TypeError, r"output_names must be a list of names, not \['a', ''\]"),
        ({"opset": "20"}, TypeError, "opset must be an integer, not '20'"),
        ({"opset": True}, TypeError, "opset must be an integer, not True"),
        ({"opset": 99}, ValueError, "torch.onnx can't write the model in opset 99, only in "),
    ],
)
def test_names_and_opsets_that_cant_be_are_refused(tmp_path, capfd, options, error, message):
    with pytest.raises(error, match=message):
        sgfx.export(compiled(Two()), tmp_path / "small.onnx", PAIR, **options)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_pt2_files_have_no_names_and_no_opset(tmp_path):
    with pytest.raises(sgfx.InputError, match=r"opset and input_names are for .onnx files: a .pt2 file has none"):
        sgfx.export(compiled(), tmp_path / "small.pt2", IMAGES, opset=20, input_names=["x"])


class Sized(nn.Module):
    """Computes something else at other sizes, unnoticed by tracing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.b(self.a(x)) * float(len(x.detach().numpy()) if not torch.compiler.is_exporting() else 2)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_differs_at_another_size_is_not_written(tmp_path, suffix):
    sgfx.export(Sized(), tmp_path / f"fixed{suffix}", IMAGES)
    with pytest.raises(sgfx.InputError, match="was not written: an output differs from the model's by"):
        sgfx.export(Sized(), tmp_path / f"small{suffix}", IMAGES, dynamic_shapes=({0: "batch"},))
    assert not (tmp_path / f"small{suffix}").exists()


def test_sizes_that_cant_be_tried_are_refused(tmp_path):
    class Pinned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            if not torch.compiler.is_exporting() and len(x) != 2:
                raise ValueError("two, please")
            return self.b(self.a(x))

    with pytest.raises(sgfx.InputError, match=r"nothing near the sizes of example_inputs is one that both the model"):
        sgfx.export(Pinned(), tmp_path / "small.pt2", IMAGES, dynamic_shapes=({0: "batch"},))


def test_a_dimension_that_comes_out_fixed_is_refused_where_it_has_a_name(tmp_path):
    with pytest.raises(sgfx.InputError, match=r"torch.export can't export Net: .*specialized"):
        sgfx.export(Net(), tmp_path / "small.onnx", IMAGES, dynamic_shapes=({1: "channels"},))


class Branching(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Decomposing(Net):
    def forward(self, x):
        return torch.linalg.svd(super().forward(x))[1]


@pytest.mark.parametrize(
    ("make", "suffix", "message"),
    [
        (Branching, ".pt2", r"can't export Branching: Could not guard on data-dependent expression .*\nExport a part"),
        (Branching, ".onnx", r"can't export Branching: Could not guard on data-dependent expression .*\nExport a part"),
        (Decomposing, ".onnx", r"torch.onnx can't convert the model: No ONNX function found for .*_linalg_svd"),
    ],
)
def test_a_failure_prints_nothing_and_says_one_thing(tmp_path, capfd, make, suffix, message):
    sys.stderr.write("before\n")
    with pytest.raises(sgfx.InputError, match=message) as caught:
        sgfx.export(make(), tmp_path / f"small{suffix}", IMAGES)
    sys.stderr.write("after\n")
    assert capfd.readouterr() == ("", "before\nafter\n")
    assert len(str(caught.value).splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_frozen_models_and_what_holds_them_are_sent_back_to_what_they_were_made_from(tmp_path, suffix):
    frozen = sgfx.freeze(compiled(), IMAGES, strategy="library")
    for model in (frozen, nn.Sequential(frozen, nn.ReLU())):
        with pytest.raises(sgfx.InputError, match=r"small is a frozen model, .* export the one that it was made from"):
            sgfx.export(model, tmp_path / f"small{suffix}", IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exported_program_is_not_loaded_but_told_how_it_runs(tmp_path, suffix):
    path = tmp_path / f"small{suffix}"
    sgfx.export(compiled(), path, IMAGES)
    renamed = tmp_path / "small.safetensors"
    renamed.write_bytes(path.read_bytes())
    how = r"torch.export.load\(path\).module\(\)" if suffix == ".pt2" else "a runtime such as ONNX Runtime"
    with pytest.raises(sgfx.InputError, match=rf"is a program in the format {suffix}, .*: {how} runs it"):
        sgfx.load(path, into=Net())
    again = rf"format {suffix}" if suffix == ".pt2" else "truncated, damaged or no safetensors file"
    with pytest.raises(sgfx.InputError, match=again):
        sgfx.load(renamed, into=Net())
