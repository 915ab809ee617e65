"""What is refused on loading a file, damaged, altered, forged or of another model: the model is as it was."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sgfx
from sgfx.files.container import checksum
from tests.sgfx.test_files import (
    IMAGES,
    LeakyNet,
    Net,
    Untied,
    assert_same,
    assert_untouched,
    eliminated_net,
    small_net,
    snapshot,
)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (
            {"outputs": [0, 8], "inputs": None},
            "layer 'block.0': its outputs that remain are not ascending numbers below 8",
        ),
        (
            {"outputs": None, "inputs": [1, 1]},
            "layer 'block.0': its inputs that remain are not ascending numbers below 8",
        ),
        ({"outputs": [], "inputs": None}, "layer 'block.0': its outputs that remain are not ascending numbers"),
        ({"outputs": None}, "is malformed .*it was not written by sgfx"),
        (
            {"outputs": [0, 1], "inputs": None},
            r"'block.0.weight' is float32 .* in the file and float32 .* in the model",
        ),
    ],
)
def test_forged_cuts_are_refused(tmp_path, cut, message):
    sgfx.save(eliminated_net(), tmp_path / "small.safetensors")
    rewrite(tmp_path / "small.safetensors", lambda structure, _: structure["cuts"].update({"block.0": cut}))
    refused(tmp_path / "small.safetensors", message)


def test_only_layers_and_norms_can_be_cut(file):
    rewrite(file, lambda structure, _: structure["cuts"].update({"block.1": {"outputs": [0], "inputs": None}}))
    refused(file, "layer 'block.1': channels of a ReLU can't be cut")


def test_missing_files_and_folders_are_named(tmp_path):
    model = Net()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist"):
        sgfx.load(tmp_path / "none.safetensors", into=model)
    with pytest.raises(sgfx.InputError, match=r"is a folder; give the path of a file that sgfx.save wrote"):
        sgfx.load(tmp_path, into=model)
    assert_untouched(model, before)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.3, 0.7, 0.999])
def test_truncated_files_are_refused(file, share):
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refused(file, "is truncated, damaged or no safetensors file")


def refused(file, message, model=None):
    model = Net() if model is None else model
    before = snapshot(model)
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.load(file, into=model)
    assert_untouched(model, before)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(b"\x89PNG" + bytes(100))
    refused(path, "is truncated, damaged or no safetensors file")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "is not a checkpoint, or a damaged one")
    save_file({"weight": torch.zeros(3)}, path)
    refused(path, "not one that sgfx.save wrote")
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    refused(path, "not one that sgfx.save wrote")


def rewrite(file, change, *, honest=True):
    """Change structure and tensors of a file; with a checksum that holds, as whoever forges a file would."""
    with safe_open(file, "pt") as content:
        structure = json.loads(content.metadata()["sgfx"])
    tensors = load_file(file)
    change(structure, tensors)
    if honest:
        summed = {key: value for key, value in structure.items() if key not in ("format", "checksum")}
        structure["checksum"] = checksum(summed, tensors)
    save_file(tensors, file, {"sgfx": json.dumps(structure)})


def test_a_file_rewritten_without_a_change_loads(file):
    rewrite(file, lambda structure, tensors: None)
    assert_same(sgfx.load(file, into=Net()), small_net())


def nudge_a_weight(structure, tensors):
    tensors["fc.weight"].view(-1)[3] += 1e-6


def swap_labels(structure, tensors):
    labels = structure["plans"]["fc"]["labels"]
    labels.reverse()


def rename_a_tensor(structure, tensors):
    tensors["fc.weights"] = tensors.pop("fc.weight")


def drop_the_sum(structure, tensors):
    del structure["checksum"]


@pytest.mark.parametrize("change", [nudge_a_weight, swap_labels, rename_a_tensor, drop_the_sum])
def test_altered_files_are_refused(file, change):
    rewrite(file, change, honest=False)
    refused(file, "was altered after sgfx.save wrote it: its checksum differs")


def test_any_flipped_bit_is_noticed(file):
    content = bytearray(file.read_bytes())

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 8 * len(content) - 1))
    def check(bit):
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(sgfx.InputError):
            sgfx.load(file, into=into)

    into = Net()
    before = snapshot(into)
    check()
    assert_untouched(into, before)


def test_newer_files_are_refused(file):
    rewrite(file, lambda structure, _: structure.update(format=3), honest=False)
    refused(file, r"was written by a newer sgfx \(format 3; this one reads formats up to 2\): upgrade")


@pytest.mark.parametrize("version", [None, "1", 0, True])
def test_a_version_that_is_none_is_refused(file, version):
    rewrite(file, lambda structure, _: structure.update(format=version), honest=False)
    refused(file, "is damaged: it says that its format is")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000])
def test_a_structure_that_is_none_is_refused(file, text):
    save_file(load_file(file), file, {"sgfx": text})
    refused(file, "is damaged: its structure can't be read")


def set_in_plan(**values):
    return lambda structure, _: structure["plans"]["fc"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in_plan(labels=[0, 1, 2]), "layer 'fc': it has 3 labels for 10 filters"),
        (set_in_plan(labels=[]), "layer 'fc': it has 0 labels for 10 filters"),
        (set_in_plan(inputs=[[0]] * 11), "layer 'fc': it has 11 groups of 10 filters"),
        (set_in_plan(inputs=[]), "layer 'fc': it has 0 groups of 10 filters"),
        (set_in_plan(labels=[3] * 10), "layer 'fc': its labels are not integers from 0 to 2"),
        (set_in_plan(labels=[-1] * 10), "layer 'fc': its labels are not integers from 0 to 2"),
        (set_in_plan(labels=[2**64] * 10), "layer 'fc': its labels are not integers from 0 to 2"),
        (set_in_plan(labels=[True] * 10), "layer 'fc': its labels are not integers from 0 to 2"),
        (set_in_plan(inputs=[[0], [1], [10**30]]), "layer 'fc': the inputs of its groups are not ascending"),
        (set_in_plan(requested_ratio=10**400), "layer 'fc': its requested_ratio must be a number in"),
        (set_in_plan(requested_ratio="0.5"), "layer 'fc': its requested_ratio must be a number in"),
        (set_in_plan(requested_ratio=float("nan")), "layer 'fc': its requested_ratio must be a number in"),
        (set_in_plan(labels=[0] * 10), "layer 'fc': labels must use every group from 0 to 2"),
        (set_in_plan(labels=[0.5, 1, 2] + [0] * 7), "layer 'fc': its labels are not integers from 0"),
        (set_in_plan(inputs=[[0], [1], [8]]), "layer 'fc': the inputs of its groups are not ascending numbers below 8"),
        (set_in_plan(inputs=[[0], [1], [-1]]), "layer 'fc': the inputs of its groups are not ascending"),
        (set_in_plan(inputs=[[0], [1], [2, 2]]), "layer 'fc': the inputs of its groups are not ascending"),
        (set_in_plan(inputs=[[], [], []]), "layer 'fc': the inputs of its groups are not ascending"),
        (set_in_plan(requested_ratio=1.5), r"layer 'fc': its requested_ratio must be a number in \[0, 1\)"),
        (set_in_plan(reason=3), "layer 'fc': its reason is no text"),
        (
            set_in_plan(in_channels=10**12),
            r"layer 'fc': it is Linear\(1000000000000, 10\) in the file and Linear\(8, 10",
        ),
        (lambda s, _: s["plans"].update(bn1=s["plans"]["fc"]), "BatchNorm2d is neither a convolution nor a linear"),
        (lambda s, _: s["plans"].update(head=s["plans"]["fc"]), "is malformed .*head.*it was not written by sgfx"),
        (lambda s, _: s["plans"]["fc"].pop("inputs"), "is malformed .*it was not written by sgfx"),
        (lambda s, _: s.pop("modules"), "is malformed .*it was not written by sgfx"),
        (lambda s, _: s.update(plans=[]), "is malformed .*it was not written by sgfx"),
        (
            lambda _, t: t.update({"fc.weight": t["fc.weight"][1:]}),
            r"'fc.weight' is float32 .* in the file and float32",
        ),
        (
            lambda _, t: t.update({"fc.bias": t["fc.bias"].double()}),
            r"'fc.bias' is float64 \[10\] in the file and float3",
        ),
        (lambda _, t: t.pop("fc.bias"), "the file lacks 'fc.bias'"),
        (lambda _, t: t.update(extra=torch.zeros(1)), "the model lacks 'extra'"),
    ],
)
def test_forged_files_are_refused(file, change, message):
    rewrite(file, change)
    refused(file, message)


def test_a_file_that_claims_millions_of_groups_is_refused_before_it_is_parsed(file, monkeypatch):
    rewrite(file, lambda s, _: s["plans"]["fc"].update(inputs=[[0]] * 300_000), honest=False)
    parsed = []
    monkeypatch.setattr(json, "loads", lambda *given: parsed.append(given))
    refused(
        file, "does not fit Net: its structure has 3001.. lists and objects .* more than a model of 132 filters can"
    )
    assert parsed == []


NASTY = st.sampled_from(
    [None, True, -1, 0.5, 10**30, -(10**400), float("nan"), float("inf"), "", "x" * 1000, [], [[]], {}, {"a": 1}]
) | st.just([[[]]] * 50)


def test_no_nonsense_passes_or_ends_otherwise_than_in_a_refusal(file):
    with safe_open(file, "pt") as content:
        text = content.metadata()["sgfx"]
    tensors, expected = load_file(file), small_net().eval()(IMAGES)

    def places(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            yield from places(item, (*path, key))

    every = [path for path in places(json.loads(text)) if path and path[0] not in ("format", "checksum")]

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(every), NASTY)
    def check(path, value):
        structure = json.loads(text)
        holder = structure
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        summed = {key: value for key, value in structure.items() if key not in ("format", "checksum")}
        structure["checksum"] = checksum(summed, tensors)
        save_file(tensors, file, {"sgfx": json.dumps(structure)})
        into = Net()
        try:
            sgfx.load(file, into=into)
        except sgfx.InputError:
            assert sgfx.plans(into) == {}
        else:  # it stood where it does no harm, such as in a reason
            assert torch.equal(into.eval()(IMAGES), expected)

    check()


def test_nesting_deeper_than_it_can_be_written_is_refused(file):
    def nest(structure, _):
        for _ in range(900):
            structure["plans"] = {"x": structure["plans"]}

    rewrite(file, nest)
    refused(file, "is malformed|checksum differs|can't be read")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (LeakyNet, "does not fit LeakyNet: it holds a Net. Make a fresh dense model of the class and options"),
        (
            lambda: Net(width=16),
            "'block.0': it is Conv2d.8, 8, kernel 3×3. in the file and Conv2d.16, 16, kernel 3×3. in",
        ),
        (lambda: Net(stride=2), r"module 'block.0' has stride \[1, 1\] in the file and \[2, 2\] in the model"),
        (Untied, "'twin_b.weight' and 'twin_a.weight' are one tensor in the file or in the model, not in both"),
        (lambda: Net().double(), "is float32 .* in the file and float64 .* in the model"),
    ],
)
def test_another_model_is_refused(file, make, message):
    refused(file, message, make())


def test_other_modules_are_refused(file):
    model = Net()
    model.block[1] = nn.GELU()
    refused(file, "module 'block.1' has class ReLU in the file and GELU in the model", model)
    del model.block[1]
    refused(file, "the model lacks 'block.2'", model)
    model = Net()
    model.head = nn.Identity()
    refused(file, "the file lacks 'head'", model)


def test_models_that_cant_be_loaded_into_are_refused(file):
    with pytest.raises(sgfx.InputError, match=r"into was compiled before. Make a fresh dense model of its class"):
        sgfx.load(file, into=small_net())
    with torch.device("meta"):
        model = Net()
    with pytest.raises(sgfx.InputError, match=r"into has 'conv1.weight' on the meta device"):
        sgfx.load(file, into=model)
    model = Net()
    model.mix = torch.zeros(1, 1).expand(10, 10)
    refused(file, "into has 'mix' expanded, so it can't be written to", model)
    with torch.inference_mode():
        model = Net()
    with pytest.raises(sgfx.InputError, match="made in inference mode, so it can't be written to"):
        sgfx.load(file, into=model)
    with pytest.raises(TypeError, match=r"into must be a torch.nn.Module, not dict"):
        sgfx.load(file, into={})
