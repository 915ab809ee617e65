"""What the trainer leaves untouched: the model's modes and objects, accelerate's state, the launcher's variables."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from tests.sgfx.test_training import Interrupted, batches, network, same_weights, states, trainer


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_the_model_is_usable(error):
    model = network()
    model[1].eval()
    modes, attributes, before = [module.training for module in model.modules()], set(vars(model)), states()
    with pytest.raises(error):
        trainer(model, Interrupted(error()), mixed_precision="bf16").fit()
    assert [module.training for module in model.modules()] == modes
    assert set(vars(model)) == attributes
    assert states() == before
    assert model(torch.ones(2, 2)).dtype == torch.float32
    assert trainer(model, epochs=10, mixed_precision="bf16").fit().epochs[-1].train_top1 > 0.9


def test_an_exception_in_validation_puts_modes_back():
    model = network()
    with pytest.raises(RuntimeError, match="disk"):
        trainer(model, val=Interrupted(RuntimeError("disk"))).fit()
    assert all(module.training for module in model.modules())


def test_the_model_is_trained_in_place_and_not_wrapped():
    model = network()
    parameters, attributes, forward = list(model.parameters()), set(vars(model)), model.forward
    before = copy.deepcopy(model)
    trainer(model, mixed_precision="bf16").fit()
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert set(vars(model)) == attributes
    assert model.forward == forward
    assert not same_weights(before, model)
    assert all(parameter.grad is None for parameter in parameters)


def test_mixed_precision_is_each_trainers_own():
    seen: list[torch.dtype] = []
    model = network()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainers = [trainer(model, batches(96), mixed_precision=precision) for precision in (None, "bf16", None, "bf16")]
    for each in trainers:
        each.fit()
    assert seen == [torch.float32, torch.bfloat16] * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_trainer_may_run_inside_another():
    inner = trainer(mixed_precision=None)
    data, expected = batches(), trainer(mixed_precision="bf16").fit()

    class Nesting:
        def __iter__(self):
            for batch in data:
                inner.fit()
                yield batch

    assert trainer(data=Nesting(), mixed_precision="bf16").fit() == expected


@pytest.fixture
def own_accelerator() -> Iterator[accelerate.Accelerator]:
    """One that a caller made, in a process without any other."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield accelerate.Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_callers_own_accelerator_goes_on_and_has_no_say(own_accelerator):
    model, alone = network(), network()
    with own_accelerator.accumulate(model):  # the first of four steps, in which its optimizers wait
        trainer(model).fit()
        assert not own_accelerator.sync_gradients
    assert own_accelerator.mixed_precision == "bf16"
    assert own_accelerator.gradient_accumulation_steps == 4
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer(alone).fit()
    assert same_weights(model, alone)


def test_variables_of_a_launcher_have_no_say(monkeypatch):
    launched, alone = network(), network()
    trainer(alone).fit()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer(launched).fit()
    assert same_weights(launched, alone)


def test_accelerates_state_is_left_as_it_was():
    singletons = (PartialState, AcceleratorState, GradientState)
    before = [dict(singleton._shared_state) for singleton in singletons]
    trainer(mixed_precision="bf16").fit()
    assert [dict(singleton._shared_state) for singleton in singletons] == before


def test_a_frozen_norm_stays_in_eval():
    model = network()
    model[1].eval()
    mean, variance = model[1].running_mean.clone(), model[1].running_var.clone()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append([m.training for m in module.modules()]))
    trainer(model, val=batches(), epochs=2).fit()
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(model[1].running_var, variance)
    frozen, evaluating = [True, True, False, True, True, True], [False] * 6
    assert seen == ([frozen] * 6 + [evaluating] * 6) * 2
    assert [module.training for module in model.modules()] == frozen


def test_a_model_in_eval_mode_trains_and_is_put_back():
    model = network().eval()
    mean = model[1].running_mean.clone()
    trainer(model).fit()
    assert not torch.equal(model[1].running_mean, mean)
    assert not any(module.training for module in model.modules())


def test_frozen_parameters_are_untouched():
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    trainer(model).fit()
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[4].weight, before[4].weight)


def test_gradients_from_before_have_no_effect():
    fresh, stale = network(), network()
    stale(batches()[0][0]).sum().backward()
    stale.load_state_dict(fresh.state_dict())
    trainer(fresh).fit()
    trainer(stale).fit()
    assert same_weights(fresh, stale)


def test_progress_bars_are_shown_on_request_only(capfd):
    trainer(val=batches()).fit()
    assert capfd.readouterr() == ("", "")
    record = trainer(val=batches(), progress=True).fit().epochs[-1]
    shown = capfd.readouterr().err
    assert f"loss={record.loss:.3g}" in shown
    assert "val_top1=" in shown


def test_importing_it_does_not_import_accelerate():
    code = "import sys, sgfx.training.trainer; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
def test_on_a_gpu(precision, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    model = network()
    record = trainer(model, val=batches(seed=1), epochs=10, mixed_precision=precision).fit().epochs[-1]
    assert record.val_top1 > 0.95
    assert all(parameter.is_cuda and parameter.dtype == torch.float32 for parameter in model.parameters())
