"""What rides on modules goes where they go, and nowhere else."""

import copy
import io

import torch
from torch import nn

from passes.layers.attached import Attached, all_attached
from passes.layers.channel_cut import Cut, cut_of, cuts, has_cut
from passes.layers.plan import LayerPlan, attach_plan, detach_plan, plan_of, plans

WEIGHT = Attached("weight_in_grams", float)


def test_a_value_rides_on_one_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    WEIGHT.put(model[0], 1.0)
    WEIGHT.put(model[1][0], 2.0)
    WEIGHT.put(model[1][0], 3.0)
    assert WEIGHT.all_in(model) == {"0": 1.0, "1.0": 3.0}
    assert WEIGHT.of(model) is None
    WEIGHT.take_off(model[0])
    WEIGHT.take_off(model[0])
    assert WEIGHT.all_in(model) == {"1.0": 3.0}


def test_copies_and_pickles_have_it_and_state_dicts_do_not():
    layer = nn.Linear(2, 2)
    before = list(layer.state_dict())
    WEIGHT.put(layer, 1.5)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), torch.load(file, weights_only=False)):
        assert WEIGHT.of(other) == 1.5
    assert list(layer.state_dict()) == before
    assert [name for name, _ in layer.named_buffers()] == []


def test_what_others_have_put_under_the_key_is_none_of_ours():
    layer = nn.Linear(2, 2)
    layer.__dict__["_sgfx_weight_in_grams"] = "heavy"
    assert WEIGHT.of(layer) is None
    assert WEIGHT.all_in(layer) == {}


def test_plans_and_cuts_ride_under_the_keys_that_pickles_have():
    layer, cut = nn.Linear(2, 3), Cut(torch.tensor([0, 2]))
    plan = LayerPlan.of(layer, reason="small")
    attach_plan(layer, plan)
    layer.__dict__["_sgfx_cut"] = cut
    assert all_attached(layer) == {"_sgfx_plan": plan, "_sgfx_cut": cut}
    assert (plan_of(layer), cut_of(layer), has_cut(layer)) == (plan, cut, True)
    assert (plans(layer), cuts(layer)) == ({"": plan}, {"": cut})
    detach_plan(layer)
    assert plan_of(layer) is None
    assert cut_of(nn.ReLU()).outputs is None
    assert not has_cut(nn.ReLU())
