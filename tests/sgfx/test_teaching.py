"""Lessons: the distance of a model and its blocks from a teacher's, by hand, and what is left out of it."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sgfx
from passes.calibration.output_distance import distance
from sgfx.training.teacher import BLOCKS, Teacher


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
        for each in (model, teacher.model):
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
    assert teacher.model.grad == [False, False]


def test_a_compiled_teacher_has_blocks_too():
    assert Teacher(sgfx.compile(Halves().eval(), groups=2, ratio=0.5))._blocks == ["twice", "wide"]
