"""What a state dict carries of the structure of masked and grouped layers, and what is refused on loading one."""

import copy
import gzip
import io
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch

import sgfx
from passes.errors import InputError
from passes.layers.encoding import as_tensor, decode, encode
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked
from passes.layers.plan import LayerPlan, plan_of
from tests.passes.layers.test_structured import assert_same_tables, compiled, dense, in_form, masked

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["dense", "masked"])
def model(request):
    return in_form(request.param)


def random_plan(filters, inputs, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(groups), torch.randint(groups, (filters - groups,), generator=generator)])
    keep = torch.rand(groups, inputs, generator=generator) > 0.5
    return LayerPlan("Conv2d", inputs, filters, (3, 3), labels, keep, 0.5)


@pytest.mark.parametrize(("filters", "inputs", "groups"), [(4, 4, 1), (9, 5, 4), (64, 17, 16), (300, 33, 299)])
def test_encoding_and_decoding_gives_the_structure_again(filters, inputs, groups):
    plan = random_plan(filters, inputs, groups, 0)
    code = as_tensor(encode(plan))
    assert (code.dtype, code.dim()) == (torch.uint8, 1)
    assert decode(code, plan.shape) == plan


def test_an_encoded_structure_describes_itself():
    plan = LayerPlan("Linear", 9, 3, (), torch.tensor([0, 1, 0]), torch.eye(9)[:2] > 0, 0.5)
    halves = as_tensor(encode(plan)) // 16
    text = bytes((halves[0::2] * 16 + halves[1::2]).tolist()).decode()
    assert text == '{"format":1,"inputs":9,"labels":[0,1,0],"keep":["8000","4000"],"requested_ratio":0.5}'


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.9995, 0.9999, 0.99998])
def test_averages_of_equal_structures_made_by_hand_are_the_structure(decay):
    plan = random_plan(64, 17, 16, 0)
    code, kept, summed = as_tensor(encode(plan)), as_tensor(encode(plan)), as_tensor(encode(plan)).double()
    for _ in range(200):
        kept.copy_(decay * kept + (1 - decay) * code)  # cuts off what is behind the point
        summed = decay * summed + (1 - decay) * code
    assert decode(kept, plan.shape) == decode(summed, plan.shape) == decode(summed.half(), plan.shape) == plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda code: code[:-1],
        lambda code: code[:-20],
        lambda code: code * 0,
        lambda code: code.flip(0),
        lambda code: code[:0],
        lambda code: code.double() * float("nan"),
        lambda code: -code.double(),
        lambda code: {"labels": [0]},
        lambda code: "text",
        lambda code: None,
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_damaged_structures_are_refused(damage):
    plan = random_plan(9, 5, 4, 0)
    with pytest.raises(InputError, match=r"_extra_state can't be read .*damaged, or was computed with"):
        decode(damage(as_tensor(encode(plan))), plan.shape)


@pytest.mark.parametrize(
    "change",
    [
        ("labels", [0.5] * 9),
        ("labels", [0] * 9),
        ("labels", [-1] * 9),
        ("labels", "000000000"),
        ("keep", ["zz"] * 4),
        ("keep", ["00"] * 10),
        ("keep", ["00"] * 3),
        ("keep", [3] * 4),
        ("keep", []),
        ("requested_ratio", 2),
        ("requested_ratio", 10**400),
        ("labels", [2**70] * 9),
        ("requested_ratio", None),
        ("inputs", True),
        ("format", 0),
        ("format", "1"),
    ],
)
def test_forged_structures_are_refused(change):
    plan = random_plan(9, 5, 4, 0)
    halves = as_tensor(encode(plan)) // 16
    record = json.loads(bytes((halves[0::2] * 16 + halves[1::2]).tolist()))
    text = torch.tensor(list(json.dumps(record | dict([change])).encode()))
    forged = torch.stack([text // 16, text % 16], 1).flatten() * 16 + 8
    with pytest.raises(InputError, match="_extra_state can't be read"):
        decode(forged, plan.shape)


def test_newer_and_other_structures_are_named():
    plan = random_plan(9, 5, 4, 0)
    code = as_tensor(encode(plan))
    code[len('{"format":') * 2 + 1] += 16
    with pytest.raises(InputError, match=r"written by a newer sgfx \(format 2; this one reads formats up to 1\)"):
        decode(code, plan.shape)
    with pytest.raises(InputError, match="of a layer with 9 filters and 5 inputs, not of one with 8 and 5"):
        decode(as_tensor(encode(plan)), ("Conv2d", 5, 8, (3, 3)))


def test_a_state_dict_is_of_its_own(model):
    before = copy.deepcopy(model)
    for name, value in model.state_dict().items():
        if name.endswith("_extra_state"):
            assert value.dtype == torch.uint8
            value.zero_()
    assert_same_tables(model, before)
    model.load_state_dict(before.state_dict())
    with torch.device("meta"):
        assert not model.state_dict()["2._extra_state"].is_meta


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_another_structure_is_refused_before_anything_of_the_layer_is_copied(strict, assign):
    torch.manual_seed(0)
    model = compiled(groups=1)
    other = dense()
    other[2].weight.data = other[2].weight.data.roll(1, 1)
    other = sgfx.compile(other, groups=1, ratio=0.5)  # the same shapes, other channels
    before = copy.deepcopy(model[2])
    with pytest.raises(RuntimeError, match=r"2\.inputs differs: the weights belong to a layer that was grouped diff"):
        model.load_state_dict(other.state_dict(), strict=strict, assign=assign)
    assert torch.equal(model[2].weight, before.weight)
    assert torch.equal(model[2].bias, before.bias)
    assert_same_tables(model[2], before)


def test_a_structure_that_is_set_by_itself_is_compared_too():
    model, plan = compiled(), sgfx.plans(compiled())["4"]
    other = LayerPlan(*plan.shape, plan.labels, ~plan.keep, plan.requested_ratio)
    model[4].set_extra_state(model[4].get_extra_state())
    with pytest.raises(InputError, match="inputs differs"):
        model[4].set_extra_state(as_tensor(encode(other)))
    layer = masked()[4]
    with pytest.raises(InputError, match="mask differs"):
        layer.set_extra_state(as_tensor(encode(other)))


def test_a_damaged_extra_state_is_refused_with_its_name():
    model = compiled()
    state = model.state_dict() | {"2._extra_state": torch.zeros(7)}
    with pytest.raises(RuntimeError, match=r"2\._extra_state can't be read"):
        model.load_state_dict(state)


def test_state_dicts_without_structure_load_where_that_is_asked_for(model):
    expected, bare = model(IMAGES), {k: v for k, v in model.state_dict().items() if "_extra" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*2\._extra_state"):
        model.load_state_dict(bare)
    result = model.load_state_dict(bare, strict=False)
    assert result.missing_keys == ["2._extra_state", "4._extra_state"]
    assert torch.equal(model(IMAGES), expected)


# Masks of another step.


def test_masks_are_taken_over_where_no_plan_says_otherwise_and_checked_where_one_does():
    first, second = masked(1), masked(2)
    fresh = sgfx.Pruner(dense(), groups=3, ratio=0.6, step=0.2).model
    for source in (first, second, first):
        fresh.load_state_dict(source.state_dict())
        assert torch.equal(fresh(IMAGES), source(IMAGES))
        assert torch.equal(fresh.state_dict()["2._extra_state"], source.state_dict()["2._extra_state"])
    before = copy.deepcopy(first)
    with pytest.raises(RuntimeError, match=r"2\.mask differs: the weights were saved at another pruning st"):
        first.load_state_dict(second.state_dict())
    assert_same_tables(first, before)


# What earlier versions wrote: they kept the structure in buffers. (The pickle's modules have been given the names that
# they have today.)


def former():
    path = Path(__file__).parents[2] / "data" / "structure_in_buffers.pt.gz"
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=False)


def test_pickles_of_earlier_versions_load_and_compute_the_same():
    content = former()
    for name, kind in (("compiled", Grouped), ("masked", Masked)):
        model, x = content[name], content["inputs"]
        torch.testing.assert_close(model(x), content["outputs"][name])
        assert list(model.buffers()) == []
        assert sum(isinstance(layer, kind) for layer in model) >= 2
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
        model.load_state_dict(copy.deepcopy(model).state_dict())


def test_structures_of_earlier_versions_agree_with_the_plans():
    content = former()
    for layer in content["masked"]:
        if isinstance(layer, Masked):
            assert torch.equal(layer.mask, plan_of(layer).mask())
            assert decode(layer.get_extra_state(), layer._shape()) == plan_of(layer)
    assert [layer.dense_shape[:2] for layer in content["compiled"]] == [(5, 2), (3, 5), (4, 3)]  # channels are gone


def test_state_dicts_of_earlier_versions_load_and_are_checked():
    content = former()
    model, state, x = content["compiled"], copy.deepcopy(content["compiled_state"]), content["inputs"]
    assert "0.filters" in state
    for parameter in model.parameters():
        parameter.data.zero_()
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), content["outputs"]["compiled"])
    weight = model[1].weight.clone()
    for name, value, message in (
        ("1.filters", state["1.filters"].flip(0), r"1\.filters differs"),
        ("1.inputs", state["1.inputs"] * 0, r"a group reads an input twice"),
        ("1.inputs", (state["1.inputs"] + 1) % 5, r"1\.inputs differs"),
        ("1.filters", state["1.filters"] + 7, r"1\.filters, inputs and block_sizes make no structure of it"),
        ("1.block_sizes", torch.zeros(2), r"1\.filters, inputs and block_sizes make no structure of it"),
        ("1.block_sizes", state["1.block_sizes"] * 10**12, r"the sizes of its blocks are others"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state | {name: value, "1.weight": state["1.weight"] + 1})
        assert torch.equal(model[1].weight, weight)


def test_masks_of_earlier_versions_load_and_are_checked():
    first, second = masked(1), masked(2)
    fresh = sgfx.Pruner(dense(), groups=3, ratio=0.6, step=0.2).model

    def as_before(model):
        state = {name: value for name, value in model.state_dict().items() if "_extra" not in name}
        return state | {f"{path}.mask": m.mask for path, m in model.named_modules() if isinstance(m, Masked)}

    fresh.load_state_dict(as_before(second))
    assert torch.equal(fresh(IMAGES), second(IMAGES))
    second.load_state_dict(as_before(second))
    with pytest.raises(RuntimeError, match=r"2\.mask differs"):
        second.load_state_dict(as_before(first))
    with pytest.raises(RuntimeError, match=r"2\.mask is torch.bool \[3\], no mask of it: it is damaged"):
        second.load_state_dict(as_before(second) | {"2.mask": torch.zeros(3, dtype=torch.bool)})


def test_nothing_of_this_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = masked()
        copy.deepcopy(model).load_state_dict(model.state_dict())
