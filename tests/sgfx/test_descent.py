"""How distillation decides its rate: what it looks at, when it goes back, and what it hands out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import sgfx
from sgfx.training.descent import Descent, warmed_cosine
from sgfx.training.drawing import Examples
from sgfx.training.teacher import Teacher
from tests.passes.calibration.test_calibrating_regions import Residual, images, made
from tests.sgfx.test_calibrate import assert_unchanged, error, state


def calibrated() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    dense, x = made(Residual()).float(), images(64).float()
    return dense, sgfx.compile(dense, groups=4, ratio=0.5, calibration=x), x


def test_the_rate_warms_up_over_a_tenth_and_falls_along_a_cosine():
    shares = [warmed_cosine(step, 40) for step in range(1, 41)]
    assert shares[:4] == pytest.approx([(1 + math.cos(math.pi * k / 40)) / 2 * (k + 1) / 4 for k in range(4)])
    assert shares[20] == pytest.approx(0.5)
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert [warmed_cosine(1, 1), warmed_cosine(1, 2), warmed_cosine(2, 2)] == pytest.approx([1.0, 1.0, 0.5])


@pytest.mark.parametrize(("lr", "halvings"), [(0.03, 0), (1.0, 3), (100.0, 8)])
def test_a_rate_that_is_too_high_is_halved_until_it_helps(lr, halvings):
    dense, small, x = calibrated()
    was = error(dense, small, x)
    descent = Descent(small.eval(), list(small.parameters()), Teacher(dense), Examples([(x,)]))
    for _ in descent.run(200, lr):
        pass
    assert descent.halved >= halvings
    assert descent.nearest_step
    assert error(dense, small, x) < was


def test_where_nothing_is_gained_the_model_stays_and_that_is_said():
    dense, small, x = calibrated()
    before = state(small)
    with pytest.warns(UserWarning, match=r"gained nothing in 2 steps from lr=30, halved 2 times: small is as it was"):
        assert sgfx.distill(dense, small, x, steps=2, lr=30) is small
    assert_unchanged(small, before)


def test_three_looks_without_a_gain_are_too_many(monkeypatch):
    """Looks that are a little farther than the first, then nearer ones."""
    dense, small, x = calibrated()
    found = iter([1.0, 1.05, 1.04, 1.03, 0.9, 0.95, 0.92, 0.8, 0.95, 0.7, 0.69])
    monkeypatch.setattr(Descent, "_look", lambda _: next(found))
    descent = Descent(small, list(small.parameters()), Teacher(dense), Examples([(x,)]))
    halved = [descent.halved for _ in descent.run(10, 1e-4)]
    assert halved == [0, 0, 1, 1, 1, 1, 1, 2, 2, 2]  # three idle looks; then one that is more than a tenth above 0.8
    assert descent.nearest_step == 10


def test_going_back_takes_the_weights_of_the_nearest_look(monkeypatch):
    dense, small, x = calibrated()
    found = iter([1.0, 0.5, 0.9, 0.8])
    monkeypatch.setattr(Descent, "_look", lambda _: next(found))
    descent = Descent(small, list(small.parameters()), Teacher(dense), Examples([(x,)]))
    weights = [[p.detach().clone() for p in small.parameters()] for _ in descent.run(3, 1e-3)]
    assert descent.nearest_step == 1
    for kept in (weights[1], weights[2], list(small.parameters())):
        assert all(torch.equal(mine, nearest) for mine, nearest in zip(kept, weights[0], strict=True))


def test_many_examples_are_held_out_and_few_are_not():
    x = torch.arange(520.0)[:, None]
    for given in ([(x,)], [(x[:200],), (x[200:],)]):
        examples = Examples(given)
        ((judged,),) = examples.held_out()
        drawn = torch.cat([examples.draw()[0] for _ in range(8)])  # 456 in batches of 64, the last of 8
        assert len(judged) == 64
        assert judged.diff(dim=0).min() >= 8
        assert sorted(torch.cat([judged, drawn])[:, 0].tolist()) == list(range(520))
    examples = Examples([(x[:100],)])
    assert len(examples.held_out()[0][0]) == 64
    assert sorted(torch.cat([examples.draw()[0] for _ in range(2)])[:, 0].tolist()) == list(range(100))


def test_batches_of_other_shapes_are_held_out_whole():
    given = [(torch.full((60, 1, size), float(size)),) for size in range(1, 17)]
    examples = Examples(given)
    judged = [int(batch[0, 0, 0]) for (batch,) in examples.held_out()]
    drawn = [int(examples.draw()[0][0, 0, 0]) for _ in range(14)]
    assert judged == [1, 9]
    assert sorted(judged + drawn) == list(range(1, 17))


def test_a_model_that_overflows_to_begin_with_is_refused():
    dense, small, x = calibrated()
    with torch.no_grad():
        small.head.weight.fill_(math.inf)
    before = state(small)
    with pytest.raises(FloatingPointError, match="before the first step"):
        sgfx.distill(dense, small, x, steps=2)
    assert_unchanged(small, before)
