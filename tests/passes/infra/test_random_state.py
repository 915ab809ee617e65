"""Random numbers: other threads see nothing of ours, and nothing global is left changed."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.infra.random_state import own_random_state, preserved_random_state

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
Q = X[None, None]
DRAWS = {
    "rand": lambda: torch.rand(3),
    "randint": lambda: torch.randint(9, (3,)),
    "randint from": lambda: torch.randint(2, 90, (3,)),
    "randperm": lambda: torch.randperm(9),
    "uniform_": lambda: torch.empty(3).uniform_(),
    "rand_like": lambda: torch.rand_like(X),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 9),
    "dropout": lambda: F.dropout(X),
    "dropout1d": lambda: F.dropout1d(X),
    "alpha_dropout": lambda: F.alpha_dropout(X, training=True),
    "rrelu": lambda: F.rrelu(X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "LSTM": lambda: nn.LSTM(8, 4, 2, dropout=0.5)(X)[0],
    "attention": lambda: F.scaled_dot_product_attention(Q, Q, Q, dropout_p=0.5),
    "Gamma": lambda: torch.distributions.Gamma(torch.ones(3), 1.0).sample(),
    "a loader's order": lambda: torch.cat(list(torch.utils.data.DataLoader(torch.arange(90), shuffle=True))),
}


@pytest.mark.parametrize("grad", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("draw", DRAWS)
def test_torch_draws_from_generators_of_ours_and_alike_each_time(draw, grad):
    before = torch.get_rng_state()
    with grad():
        with own_random_state():
            first, second = DRAWS[draw](), DRAWS[draw]()
        with own_random_state():
            again = DRAWS[draw]()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_that_are_given_are_used():
    with own_random_state():
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(5))
        in_place = torch.empty(3).uniform_(generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(in_place, torch.empty(3).uniform_(generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("seed", [3, 4])
def test_what_takes_no_generator_is_put_back(seed):
    def draw():
        torch.manual_seed(3)
        raise RuntimeError(f"inside: {torch.rand(1)} {random.random()} {np.random.rand()}")

    torch.manual_seed(seed)
    torch.rand(5)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    for kept in (own_random_state, preserved_random_state):
        with pytest.raises(RuntimeError, match="inside"), kept():
            draw()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), repr(np.random.get_state())) == before[1:]


class Drawing(nn.Module):
    """Draws in both modes, on proxies and off them."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        y = F.dropout(torch.relu(self.conv1(x)), 0.5, self.training)
        return self.fc((self.conv2(y) + torch.rand(8, 1, 1)).mean((2, 3)))


def test_other_threads_never_draw_the_same_numbers_twice():
    torch.manual_seed(0)
    dense, images = Drawing(), torch.randn(4, 3, 8, 8)
    drawn, stop = [], threading.Event()

    def go_on():
        while not stop.is_set():
            drawn.append(tuple(torch.rand(4).tolist()))

    other = threading.Thread(target=go_on)
    other.start()
    try:
        small = sgfx.compile(dense, groups=3, ratio=0.6, example_inputs=images, eliminate=True, leaf_modules="conv1")
        sgfx.verify(dense, small, images)
        sgfx.calibrate(dense, sgfx.compile(dense, groups=3, ratio=0.6), images)
    finally:
        stop.set()
        other.join()
    expected = torch.Generator()
    torch.manual_seed(0)
    Drawing(), torch.randn(4, 3, 8, 8)
    expected.set_state(torch.get_rng_state())
    assert len(drawn) > 10
    assert drawn == [tuple(torch.rand(4, generator=expected).tolist()) for _ in drawn]


def test_a_number_that_numpy_had_in_store_is_given_back():
    """Gaussians are made in pairs: drawing the second moves nothing but the store."""
    np.random.seed(0)
    np.random.standard_normal()
    before = np.random.get_state(legacy=False)
    with preserved_random_state():
        second = np.random.standard_normal()
    assert (before["has_gauss"], np.random.get_state(legacy=False)["has_gauss"]) == (1, 1)
    assert np.random.standard_normal() == second
