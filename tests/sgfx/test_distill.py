"""`sgfx.distill` and the trainer's teacher: what they reach, what they leave alone, and their refusals."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sgfx
from sgfx.distillation import varied
from sgfx.teaching import BLOCKS, Teacher, distance
from tests.passes.test_calibrating_regions import Difference, Residual, images, made
from tests.sgfx.test_calibrate import assert_unchanged, error, state


def compiled(**options) -> tuple[nn.Module, nn.Module]:
    dense = made(Residual()).float()
    return dense, sgfx.compile(dense, groups=4, ratio=0.5, **options)


def test_the_loss_is_the_error_over_the_variance():
    wanted = torch.tensor([[1.0, 3.0]])  # variance 1
    assert distance(wanted + 0.5, wanted).item() == pytest.approx(0.25)
    assert distance(wanted, wanted).item() == 0


def test_a_single_number_is_measured_against_its_size():
    assert distance(torch.tensor([[3.0]]), torch.tensor([[2.0]])).item() == pytest.approx(0.25)
    same = torch.full((4, 1), 2.0)
    assert distance(same + 1, same).item() == pytest.approx(0.25)
    assert distance(torch.full((2, 3), 0.5), torch.zeros(2, 3)).item() == 0.25


def test_half_precision_does_not_overflow():
    wanted = torch.tensor([0.0, 300.0], dtype=torch.float16)  # whose squares are above the largest number of fp16
    assert distance(2 * wanted, wanted).item() == pytest.approx(2.0)


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


def test_outputs_in_dicts_and_lists_count_alike():
    class Two(nn.Module):
        def forward(self, x):
            return {"a": x, "b": [2 * x, 3]}

    x = torch.tensor([1.0, 3.0], requires_grad=True)
    outputs, loss = Teacher(Two()).lesson(nn.Identity(), (x,), lambda: {"a": x + 0.5, "b": [2 * x, 3]})
    assert loss.item() == pytest.approx(0.125)
    assert torch.equal(outputs["a"], x + 0.5)
    with pytest.raises(sgfx.InputError, match="can't be compared"):
        Teacher(Two()).lesson(nn.Identity(), (x,), lambda: x)


class Halves(nn.Module):
    """A block called twice, and one whose hidden width may differ."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.wide = nn.Sequential(nn.Linear(4, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.wide(self.twice(self.twice(x))))


def test_a_lesson_compares_outputs_and_what_blocks_give_at_every_call():
    torch.manual_seed(0)
    dense, x = Halves(), torch.randn(5, 4)
    for width in (6, 7):
        small = Halves(width)
        found, loss = Teacher(dense).lesson(small, (x,), lambda small=small: small(x))
        steps = [(small.twice(x), dense.twice(x))]
        steps.append((small.twice(steps[0][0]), dense.twice(steps[0][1])))
        if width == 6:
            steps.append((small.wide(steps[1][0]), dense.wide(steps[1][1])))
        reads = [x, steps[0][1], steps[1][1]]
        scales = [max(b.var(correction=0), y.var(correction=0)) for (_, b), y in zip(steps, reads, strict=False)]
        terms = [(((a - b) ** 2).mean() / scale).item() for (a, b), scale in zip(steps, scales, strict=True)]
        output = (((found - dense(x)) ** 2).mean() / dense(x).var(correction=0)).item()
        assert loss.item() == pytest.approx(output + BLOCKS * sum(terms) / len(terms), rel=1e-5)
        assert not any(module._forward_hooks for model in (dense, small) for module in model.modules())


def test_blocks_that_are_called_otherwise_are_left_out():
    torch.manual_seed(0)
    dense, x = Halves(), torch.randn(5, 4)

    class Once(Halves):
        def forward(self, x):
            return self.head(self.wide(self.twice(x)))

    class Renamed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    small = Once()
    found, loss = Teacher(dense).lesson(small, (x,), lambda: small(x))
    read = dense.twice(dense.twice(x))
    wide = dense.wide(read)
    scale = max(read.var(correction=0), wide.var(correction=0))
    missed = (small.wide(small.twice(x)) - wide).square().mean() / scale
    assert loss.item() == pytest.approx((distance(found, dense(x)) + BLOCKS * missed).item(), rel=1e-5)
    other = Renamed(small)
    found, loss = Teacher(dense).lesson(other, (x,), lambda: other(x))
    assert loss.item() == pytest.approx(distance(found, dense(x)).item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_lessons_leave_no_hooks_even_if_they_fail():
    dense, small, x = Halves(), Halves(), torch.randn(5, 4)
    scripted = Halves()
    scripted.wide = torch.jit.script(scripted.wide)  # takes no hooks
    teacher = Teacher(dense)
    for model, inputs, fails in ((small, x[:, :3], True), (small, x, True), (scripted, x, False)):
        with pytest.raises((sgfx.InputError, ZeroDivisionError)) if fails else nullcontext():
            teacher.lesson(model, (inputs,), lambda m=model, fails=fails: m(x) if not fails else 1 / 0)
        for each in (model, teacher._model):
            assert not any(module._forward_hooks for module in each.modules())


class Unusual(nn.Module):
    """Its block gives, besides a tensor, what can't be compared; in train mode another block is called."""

    def __init__(self, more) -> None:
        super().__init__()
        self.block, self.aux, self.head = Wrapped(more), Wrapped(None), nn.Linear(4, 3)

    def forward(self, x):
        if self.training:
            self.aux(x)
        return self.head(self.block(x)[0])


class Wrapped(nn.Module):
    def __init__(self, more) -> None:
        super().__init__()
        self.inner, self.more = nn.Linear(4, 4), more

    def forward(self, x):
        y = self.inner(x)
        return (y, None) if self.more is None else (y, self.more(y))


@pytest.mark.parametrize(
    ("more", "counts"),
    [
        (None, 1),
        (lambda y: y.relu(), 2),
        (lambda y: y[:0], 1),
        (lambda y: y.long(), 1),
        (lambda y: y.to_sparse(), 1),
        (lambda y: torch.nested.nested_tensor([y[0], y[1, :2]]), 1),
        (lambda y: y.masked_fill(torch.eye(5, 4, dtype=torch.bool), -math.inf), 1),
        (lambda y: y[: int(y[0, 0] > 0) + 1], 0),  # of another shape in the two: the block is left out
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_what_blocks_give_and_cant_be_compared_is_left_out(more, counts):
    torch.manual_seed(4)
    dense, small, x = Unusual(more), Unusual(more), torch.randn(5, 4)
    with torch.no_grad():
        dense.block.inner.bias[0], small.block.inner.bias[0] = 9, -9
    found, loss = Teacher(dense).lesson(small, (x,), lambda: small(x))
    terms = []
    for change in (nn.Identity(), nn.ReLU())[:counts]:
        own, goal = change(small.block.inner(x)), change(dense.block.inner(x))
        terms.append((own - goal).square().mean() / max(goal.var(correction=0), x.var(correction=0)))
    expected = distance(found, dense(x)) + (BLOCKS * torch.stack(terms).mean() if terms else 0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_block_that_reads_what_is_not_finite_is_compared():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = Mix(), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mix(x, torch.full((5, 5), -math.inf).triu(1)))

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x, mask):
            return (self.query(x) @ x.T + mask).softmax(1) @ x

    torch.manual_seed(0)
    dense, small, x = Attention(), Attention(), torch.randn(5, 4)
    found, loss = Teacher(dense).lesson(small, (x,), lambda: small(x))
    assert loss.item() > distance(found, dense(x)).item()


def test_a_branch_counts_as_little_as_it_adds():
    torch.manual_seed(0)
    dense, x = Halves(), torch.randn(64, 4)
    with torch.no_grad():
        dense.wide[0].weight.mul_(1e-4)
        dense.wide[0].bias.zero_()
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.wide[0].weight.zero_()
    _, loss = Teacher(dense).lesson(small, (x,), lambda: small(x))
    alone = distance(small(x), dense(x))
    assert 0 < (loss - alone).item() < 1e-7


def test_outputs_without_gradient_are_refused_though_blocks_have_one():
    class Stopped(Halves):
        def forward(self, x):
            return super().forward(x).detach()

    dense, x = Stopped(), torch.randn(5, 4)
    small = sgfx.compile(dense, groups=2, ratio=0.5)
    with pytest.raises(sgfx.InputError, match="the model's outputs have no gradient"):
        sgfx.distill(dense, small, x, steps=1)


def test_a_teacher_is_in_eval_mode_has_no_gradient_and_leaves_inputs_alone():
    class Hasty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5))
            self.head = nn.Conv2d(3, 2, 1)
            self.grad: list[bool] = []

        def forward(self, x):
            self.grad.append(torch.is_grad_enabled())
            return self.head(self.block(x))

    dense, x = Hasty().train(), torch.randn(4, 3, 5, 5)
    before, teacher = x.clone(), Teacher(dense)
    assert teacher._blocks == ["block"]
    for _ in range(2):
        _, loss = teacher.lesson(dense, (x,), lambda: dense.eval()(x.clone()))
        assert loss.item() == 0
    assert torch.equal(x, before)
    assert teacher._model.grad == [False, False]


def test_a_compiled_teacher_has_blocks_too():
    assert Teacher(sgfx.compile(Halves().eval(), groups=2, ratio=0.5))._blocks == ["twice", "wide"]


def test_distilling_brings_blocks_closer_too(monkeypatch):
    torch.manual_seed(0)
    dense, x = Halves(32).eval(), torch.randn(64, 4)
    errors = []
    for weight in (BLOCKS, 0.0):
        monkeypatch.setattr("sgfx.teaching.BLOCKS", weight)
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
    sgfx.distill(dense, small, x, steps=3)
    with torch.inference_mode():
        sgfx.distill(dense, other, x.clone(), steps=3)
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
        monkeypatch.setattr("sgfx.teaching.BLOCKS", weight)
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
        ({"steps": 0}, ValueError, "steps must be a whole number"),
        ({"steps": 1.5}, ValueError, "steps must be a whole number"),
        ({"lr": 0}, ValueError, "lr must be a number above 0"),
        ({"lr": float("nan")}, ValueError, "lr must be a number above 0"),
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
