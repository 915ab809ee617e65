"""`sgfx.distill` and the trainer's teacher: what they reach, what they leave alone, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sgfx
from passes.calibration.output_distance import distance
from passes.layers.channel_cut import cuts
from sgfx.training.drawing import varied
from sgfx.training.teacher import BLOCKS
from tests.passes.calibration.test_calibrating_regions import Difference, Residual, images, made
from tests.sgfx.test_calibrate import assert_unchanged, error, state
from tests.sgfx.test_teaching import Halves


def compiled(**options) -> tuple[nn.Module, nn.Module]:
    dense = made(Residual()).float()
    return dense, sgfx.compile(dense, groups=4, ratio=0.5, **options)


def test_inputs_of_other_lengths_and_outputs_without_gradient():
    class Mixed(nn.Module):
        def __init__(self, detached: bool = False) -> None:
            super().__init__()
            self.one, self.other, self.detached = nn.Linear(8, 16), nn.Linear(16, 4), detached

        def forward(self, x, mixing):
            y = self.other(torch.relu(mixing @ self.one(x)))
            return y.detach() if self.detached else y

    data = [(torch.randn(64, 6, 8), torch.randn(6, 6))]
    for detached in (False, True):
        dense = Mixed(detached).eval()
        small = sgfx.compile(dense, groups=2, ratio=0.5)
        before = state(small)
        if detached:
            with pytest.raises(sgfx.InputError, match="the model's outputs have no gradient"):
                sgfx.distill(dense, small, data, steps=2)
            assert_unchanged(small, before)
        else:
            sgfx.distill(dense, small, data, steps=2)
            assert not torch.equal(small.other.weight, before["other.weight"])


def test_outputs_without_gradient_are_refused_though_blocks_have_one():
    class Stopped(Halves):
        def forward(self, x):
            return super().forward(x).detach()

    dense, x = Stopped(), torch.randn(5, 4)
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    with pytest.raises(sgfx.InputError, match="the model's outputs have no gradient"):
        sgfx.distill(dense, small, x, steps=1)


def test_distilling_brings_blocks_closer_too(monkeypatch):
    torch.manual_seed(0)
    dense, x = Halves(32).eval(), torch.randn(64, 4)
    errors = []
    for weight in (BLOCKS, 0.0):
        monkeypatch.setattr("sgfx.training.teacher.BLOCKS", weight)
        small = sgfx.distill(dense, sgfx.compile(dense, groups=2, ratio=0.5), x, steps=100, lr=1e-2)
        errors.append(distance(small.twice(x), dense.twice(x)).item())
    assert errors[0] < 0.7 * errors[1]


def test_distilling_brings_the_outputs_closer_and_keeps_statistics():
    x = images(64).float()
    dense, small = compiled(calibration=x)
    dense_before, before, objects = state(dense), state(small), dict(small.named_parameters())
    small.train()
    was = error(dense, small, x)
    small.train()
    assert sgfx.distill(dense, small, [(x, torch.zeros(64))], steps=60, lr=3e-3) is small
    assert small.training
    assert error(dense, small, x) < 0.7 * was
    assert_unchanged(dense, dense_before)
    assert all(torch.equal(small.state_dict()[n], t) for n, t in before.items() if "running" in n or "inputs" in n)
    assert all(small.get_parameter(name) is parameter for name, parameter in objects.items())
    assert all(parameter.grad is None for parameter in [*small.parameters(), *dense.parameters()])


def test_the_same_steps_give_the_same_weights_and_random_state_stays():
    dense, first = compiled()
    _, second = compiled()
    first.head.weight.requires_grad_(False)
    second.head.weight.requires_grad_(False)
    frozen = first.head.weight.clone()
    random = torch.get_rng_state()
    for model in (first, second):
        sgfx.distill(dense, model, images(16).float(), steps=3)
    assert_unchanged(first, state(second))
    assert torch.equal(first.head.weight, frozen)
    assert torch.equal(torch.get_rng_state(), random)


def test_variations_are_flips_and_shifts():
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    ways = set()
    for found in varied(image.expand(300, 1, 8, 8), generator)[:, 0]:
        nonzero = found[found > 0]
        steps = {float(each) for each in found.diff(dim=1)[(found[:, 1:] > 0) & (found[:, :-1] > 0)]}
        assert len(nonzero) in (64, 56, 49)
        assert steps in ({1.0}, {-1.0})
        ways.add(tuple(found.flatten().tolist()))
    assert len(ways) == 18  # two flips, three shifts each way
    assert torch.equal(varied(torch.ones(2, 3), generator), torch.ones(2, 3))


def test_a_trainer_with_a_teacher_needs_no_right_labels():
    x = images(64).float()
    dense, small = compiled(calibration=x)
    was = error(dense, small, x)
    for module in small.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)  # norms keep their statistics
    wrong = [(x, torch.zeros(64, dtype=torch.int64))]
    sgfx.Trainer(small, wrong, epochs=30, lr=0.03, teacher=dense, progress=False, weight_decay=0.0).fit()
    assert error(dense, small, x) < 0.95 * was


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_distilled_in_single_precision(half):
    x = images(64).float()
    dense, small = compiled(calibration=x)
    sgfx.distill(dense, small, x, steps=20, lr=3e-3)
    dense_half, small_half = dense.to(half), compiled(calibration=x)[1].to(half)
    sgfx.distill(dense_half, small_half, x.to(half), steps=20, lr=3e-3)
    assert all(parameter.dtype == half for parameter in small_half.parameters())
    near = torch.cat([parameter.detach().flatten() for parameter in small.parameters()])
    found = torch.cat([parameter.detach().float().flatten() for parameter in small_half.parameters()])
    assert float((near - found).abs().mean()) < 0.02 * float(near.abs().mean())


def test_distilling_under_inference_mode_and_with_two_inputs():
    x = images(64).float()
    dense, small = compiled(calibration=x)
    other = compiled(calibration=x)[1]
    sgfx.distill(dense, small, x, steps=12)
    with torch.inference_mode():
        sgfx.distill(dense, other, x.clone(), steps=12)
    assert_unchanged(other, state(small))
    two = made(Difference()).float()
    small = sgfx.compile(two, groups=2, ratio=0.5)
    before = small.head.weight.clone()
    sgfx.distill(two, small, [(x, x.flip(2), torch.zeros(64))], steps=3)
    assert not torch.equal(small.head.weight, before)


def test_a_trainer_with_a_teacher_needs_no_labels_at_all():
    x = images(64).float()
    dense, _ = compiled()
    found = []
    for batches in ([(x, torch.zeros(64, dtype=torch.int64))], [x], [(x,)]):
        small = compiled(calibration=x)[1]
        history = sgfx.Trainer(small, batches, epochs=2, lr=0.01, teacher=dense, progress=False).fit()
        found.append((history.epochs[-1], state(small)))
    assert [record.train_top1 is None for record, _ in found] == [False, True, True]
    for _, tensors in found[1:]:
        assert all(torch.equal(tensor, found[0][1][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_trainer_brings_blocks_closer_too(monkeypatch, precision):
    torch.manual_seed(0)
    dense, x = Halves(32).eval(), torch.randn(64, 4)
    errors = []
    for weight in (BLOCKS, 0.0):
        monkeypatch.setattr("sgfx.training.teacher.BLOCKS", weight)
        small = sgfx.compile(dense, groups=2, ratio=0.5)
        sgfx.Trainer(small, [x], epochs=100, lr=0.01, teacher=dense, mixed_precision=precision, progress=False).fit()
        errors.append(distance(small.twice(x), dense.twice(x)).item())
    assert errors[0] < 0.7 * errors[1]


def test_a_teacher_that_does_not_fit_moves_nothing():
    x = images(8).float()
    _, small = compiled()
    before = state(small)
    for teacher, message in (
        (nn.Sequential(nn.Flatten(), nn.Linear(108, 7)), r"outputs \[8, 5\] can't be compared with .* \[8, 7\]"),
        (nn.Linear(99, 5), r"data of shape \[8, 3, 6, 6\] do not fit the teacher"),
    ):
        trainer = sgfx.Trainer(small, [x], epochs=1, lr=0.1, teacher=teacher, progress=False)
        with pytest.raises(sgfx.InputError, match=message):
            trainer.fit()
        assert_unchanged(small, before)
    with pytest.raises(TypeError, match="train_data must be an iterable of batches"):
        sgfx.Trainer(small, x, epochs=1, lr=0.1, teacher=nn.Linear(2, 2))
    with pytest.raises(sgfx.InputError, match="label_smoothing is of labels"):
        sgfx.Trainer(small, [x], epochs=1, lr=0.1, teacher=nn.Linear(2, 2), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, not 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, not 1.5"),
        ({"lr": 0}, ValueError, "lr must be above 0 and finite"),
        ({"lr": float("nan")}, ValueError, "lr must be above 0 and finite"),
        ({"data": torch.zeros(0, 3, 6, 6)}, ValueError, "no examples"),
        ({"data": torch.full((2, 3, 6, 6), float("nan"))}, ValueError, "holds NaN"),
        ({"data": torch.zeros(2, 5, 6, 6)}, ValueError, r"data of shape \[2, 5, 6, 6\] do not fit"),
        ({"lr": 1e30}, FloatingPointError, "the loss became"),
    ],
)
def test_refusals_change_nothing(options, kind, message):
    dense, small = compiled()
    before = state(small)
    options = {"data": images(4).float(), "steps": 3, **options}
    with pytest.raises(kind, match=message):
        sgfx.distill(dense, small, **options)
    assert_unchanged(small, before)


def test_models_without_a_common_ground_are_refused():
    dense, small = compiled()
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(sgfx.InputError, match="nothing to train"):
        sgfx.distill(dense, small, images(4).float())
    with pytest.raises(sgfx.InputError, match="no regrouped layers"):
        sgfx.distill(dense, dense, images(4).float())
    with pytest.raises(TypeError, match=r"teacher must be a torch\.nn\.Module"):
        sgfx.Trainer(small, [], epochs=1, lr=0.1, teacher="dense")


def test_an_eliminated_model_is_distilled_too():
    x, dense = images(64).float(), made(Residual()).float()
    small = sgfx.compile(dense, groups=4, ratio=0.7, calibration=x, eliminate=True)
    assert cuts(small)
    was = error(dense, small, x)
    sgfx.distill(dense, small, x, steps=40, lr=3e-3)
    assert error(dense, small, x) < 0.8 * was


class TwoOutputs(nn.Module):
    """One of them may have no elements, as what a detector gives where it finds nothing."""

    def __init__(self, both=False):
        super().__init__()
        self.one, self.other, self.both = nn.Linear(6, 8), nn.Linear(8, 4), both

    def forward(self, x):
        y = self.other(self.one(x).relu())
        return {"none": y[:, :0], "scores": y[:0] if self.both else y}


def test_an_output_without_elements_has_no_say():
    torch.manual_seed(0)
    dense, data = TwoOutputs(), torch.randn(64, 6)
    small = sgfx.compile(dense, groups=2, ratio=0.5, overrides={"one": {"ratio": 0.5}})
    before = (small(data)["scores"] - dense(data)["scores"]).square().mean()
    sgfx.distill(dense, small, data, steps=30, lr=1e-2)
    assert (small(data)["scores"] - dense(data)["scores"]).square().mean() < 0.8 * before
    outputs, wanted = torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert distance([outputs, torch.ones(0)], [wanted, torch.ones(0)]) == distance(outputs, wanted)
    dense = TwoOutputs(both=True)
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    with pytest.raises(sgfx.InputError, match=r"teacher's outputs \[64, 0\], \[0, 4\] hold no numbers"):
        sgfx.distill(dense, small, data)


def test_ctrl_c_keeps_what_was_nearest():
    """Of a run that is not interrupted, too: the rate falls with the same steps. Every second step is looked at."""
    torch.manual_seed(0)
    dense, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 6)
    small = sgfx.compile(dense, groups=2, ratio=0.5, overrides={"0": {"ratio": 0.5}})
    before, reached = state(small), []

    class Adam(torch.optim.Adam):
        def step(self):
            super().step()
            reached.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
            if len(reached) == 8:
                raise KeyboardInterrupt  # in the eighth step, which has moved parameters already

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Adam)
        with pytest.raises(KeyboardInterrupt) as caught:
            sgfx.distill(dense, small, data, steps=20)
    assert caught.value.__notes__ == [
        "sgfx: distill was interrupted after 7 of 20 steps; small holds what step 6 reached"
    ]
    assert all(torch.equal(mine, kept) for mine, kept in zip(small.parameters(), reached[5], strict=True))
    assert not any(torch.equal(value, before[name]) for name, value in small.named_parameters())
    assert not any(module._forward_hooks for model in (dense, small) for module in model.modules())
    sgfx.distill(dense, small, data, steps=2)


def test_ctrl_c_before_the_first_step_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    dense, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(64, 6)
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    before = state(small)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        sgfx.distill(dense, small, data, steps=20)
    assert caught.value.__notes__ == ["sgfx: distill was interrupted after 0 of 20 steps; small is as it was"]
    assert_unchanged(small, before)
