"""Bad input to `sgfx.compile`: one clear message, and nothing changed. (Options: test_selecting.py.)"""

import copy

import pytest
import torch
from torch import nn

import sgfx


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(8)
    )


def ready():
    model = net()
    model(torch.zeros(2, 3, 6, 6))
    return model


def spoiled(spoil):
    model = ready()
    spoil(model)
    return model


def set_weight(value):
    def spoil(model):
        with torch.no_grad():
            model[2].weight[1, 2] = value

    return spoil


def hold_activation(model):
    model[2].last_output = model[2].weight * 2


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_ratios_outside_zero_to_one(ratio):
    model = ready()
    for option in ("ratio", "linear_ratio"):
        options = {"ratio": 0.5} | {option: ratio}
        with pytest.raises(
            sgfx.InputError, match=rf"^{option} must be at least 0 and below 1, not {ratio}: it is the share of"
        ):
            sgfx.compile(model, **options)


def test_a_ratio_or_a_budget_is_required():
    with pytest.raises(sgfx.InputError, match=r"give exactly one of ratio .* and budget"):
        sgfx.compile(ready())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net(), r"module '4' \(LazyLinear\) is not initialised yet: run one batch"),
        (spoiled(set_weight(float("nan"))), r"layer '2' \(Conv2d\): its weight holds NaN or infinite values; repair"),
        (spoiled(set_weight(float("inf"))), r"layer '2' \(Conv2d\): its weight holds NaN or infinite values"),
        (spoiled(hold_activation), r"module '2' \(Conv2d\) holds 'last_output' \(Tensor\), which can't be copied"),
        (ready().to("meta"), r"module '0' \(Conv2d\) has its weight on the meta device: load real weights"),
        (nn.DataParallel(ready()), "the model is wrapped in DataParallel; compile its .module"),
        (nn.Sequential(nn.DataParallel(ready())), "module '0' is wrapped in DataParallel"),
        (torch.compile(ready()), "the model is a torch.compile wrapper; compile its ._orig_mod"),
        (nn.Sequential(nn.Conv2d(3, 8, 3)), "nothing to compress: '0': first convolution"),
        (nn.ReLU(), "nothing to compress: it has no convolutions or linear layers"),
    ],
)
def test_models_that_can_not_be_compiled(model, message):
    with pytest.raises(sgfx.InputError, match=message):
        sgfx.compile(model, ratio=0.5)


def test_what_is_no_module_is_a_type_error():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not dict"):
        sgfx.compile({}, ratio=0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantized_and_scripted_models():
    quantized = torch.ao.quantization.quantize_dynamic(ready(), {nn.Linear})
    with pytest.raises(sgfx.InputError, match=r"module '4' \(Linear\) is quantized; compile the floating-point model"):
        sgfx.compile(quantized, ratio=0.5)
    with pytest.raises(sgfx.InputError, match="the model is TorchScript; compile the Python module"):
        sgfx.compile(torch.jit.script(ready()), ratio=0.5)


def test_a_compiled_model_is_not_compiled_again():
    small = sgfx.compile(ready(), ratio=0.5)
    with pytest.raises(sgfx.InputError, match="it was compiled before; compile the dense model anew"):
        sgfx.compile(small, ratio=0.5)


def test_a_pruners_model_is_to_be_lowered_not_compiled():
    pruner = sgfx.Pruner(ready(), ratio=0.5, step=0.25)
    with pytest.raises(sgfx.InputError, match=r"already masked by a Pruner: call its lower\(\) instead"):
        sgfx.compile(pruner.model, ratio=0.5)


def test_example_inputs_of_the_wrong_shape_name_the_layer():
    with pytest.raises(
        sgfx.InputError, match=r"example_inputs of shape \[2, 4, 6, 6\] do not fit the model at layer '0'"
    ):
        sgfx.compile(ready(), ratio=0.5, example_inputs=torch.zeros(2, 4, 6, 6))
    with pytest.raises(sgfx.InputError, match=r"do not fit the model at layer '4'"):
        sgfx.compile(ready(), ratio=0.5, example_inputs=torch.zeros(2, 3, 9, 9))


def test_a_criterion_that_misbehaves_names_the_layer():
    with pytest.raises(sgfx.InputError, match=r"layer '2' \(Conv2d\): the criterion returned shape \[8\], expected"):
        sgfx.compile(ready(), ratio=0.5, criterion=lambda weight: weight.flatten(1).sum(1))


def test_finetune_needs_a_step():
    with pytest.raises(sgfx.InputError, match="give step too"):
        sgfx.compile(ready(), ratio=0.5, finetune=lambda model, step: None)


def test_finetune_must_be_callable():
    with pytest.raises(TypeError, match=r"finetune must be callable as finetune\(model, step\), not 5"):
        sgfx.compile(ready(), ratio=0.5, step=0.25, finetune=5)


def test_equal_filters_give_fewer_groups_and_no_warning():
    def equal(model):
        model[2].weight.data.fill_(0.5)

    plan = sgfx.plans(sgfx.compile(spoiled(equal), groups=4, ratio=0.5))["2"]
    assert plan.groups == 1
    assert plan.achieved_ratio == 0.5


@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_changed_by_an_error(inplace):
    model = spoiled(set_weight(float("nan")))
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(sgfx.InputError, match="NaN"):
        sgfx.compile(model, ratio=0.5, inplace=inplace)
    assert list(model.modules()) == modules
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(model.state_dict().values(), state.values(), strict=True)
    )
    assert sgfx.plans(model) == {}


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"ratio": 80}, "ratio must be .* not 80: it is the share .*; did you mean 0.8"),
        ({"ratio": 0.8, "linear_ratio": 60.0}, "linear_ratio must be .* not 60.0: .*; did you mean 0.6"),
        ({"ratio": 0.8, "step": 5}, "step must be above 0 and below 1, not 5: .*; did you mean 0.05"),
        (
            {"ratio": 0.8, "overrides": {"2": {"ratio": 50}}},
            "ratio of override '2' must be .* not 50: .*; did you mean 0.5",
        ),
        (
            {"budget": {"macs": 30}},
            r"budget\['macs'\] must be above 0 and at most 1, not 30: .*; did you mean 0.3",
        ),
        ({"budget": {"params": 12.5}}, r"budget\['params'\] .* not 12.5: .*; did you mean 0.125"),
        ({"ratio": 1.0}, r"not 1.0: it is the share of connections that is pruned$"),
        ({"ratio": 100}, r"not 100: it is the share of connections that is pruned$"),
        ({"ratio": float("inf")}, r"not inf: it is the share of connections that is pruned$"),
    ],
)
def test_percent_where_a_share_is_meant(options, meant):
    with pytest.raises(sgfx.InputError, match=meant):
        sgfx.compile(ready(), calibration=torch.zeros(4, 3, 6, 6), **options)


@pytest.mark.parametrize("data", [torch.randn(3, 6, 6), [(torch.randn(3, 6, 6), 4)] * 2], ids=["tensor", "dataset"])
def test_single_images_where_batches_are_meant(data):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval()
    small = sgfx.compile(model, groups=2, ratio=0.5)
    message = r"data of shape \[\d, 6, 6\] do(es)? not fit .*If that is a single image .*image\[None\]"
    calls = (
        lambda: sgfx.calibrate(model, small, data),
        lambda: sgfx.distill(model, small, data),
        lambda: sgfx.compile(model, groups=2, budget={"params": 0.7}, calibration=data),
    )
    for call in calls:
        with pytest.raises(sgfx.InputError, match=message):
            call()
