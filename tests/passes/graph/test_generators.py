"""Generators: a streamed call draws from those that the model draws from; what a graph can't do is refused by name."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import fxstream
from fxstream.errors import CaptureError

X = torch.randn(2, 4, 8)
GLOBAL = torch.Generator()


class Model(nn.Module):
    def __init__(self, function, **kept):
        super().__init__()
        self.function = function
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, x, generators=()):
        return self.function(self, x, generators)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(generator):
    return torch.randn(X.shape, generator=generator)


def test_the_calls_generators_are_drawn_from_and_one_plan_serves_them_all():
    model = Model(lambda m, x, given: x + noise(given[0]) + torch.rand(x.shape, generator=given[1]) + noise(given[0]))
    streamed = fxstream.optimize(model, "min", (X, seeded(0, 0)))
    for seeds in ((1, 2), (3, 4)):
        mine, its = seeded(*seeds), seeded(*seeds)
        for _ in range(2):
            assert torch.equal(streamed(X, mine), model(X, its))
    assert len(streamed.plans) == 1


def test_one_generator_given_twice_is_one():
    model = Model(lambda m, x, given: x + noise(given[0]) * noise(given[1]))
    streamed = fxstream.optimize(model, "min")
    (mine,), (its,) = seeded(1), seeded(1)
    assert torch.equal(streamed(X, [mine, mine]), model(X, [its, its]))
    assert torch.equal(streamed(X, seeded(1, 2)), model(X, seeded(1, 2)))
    assert len(streamed.plans) == 2


def test_generators_that_a_model_keeps_are_drawn_from():
    def forward(m, x, given):
        return x + noise(m.one) + noise(m.more["two"]) + noise(GLOBAL) + noise(torch.default_generator)

    model, other = (Model(forward, one=one, more={"two": two}) for one, two in (seeded(1, 2), seeded(1, 2)))
    streamed = fxstream.optimize(other, "min", (X,))
    assert [other.one.initial_seed(), other.more["two"].initial_seed()] == [1, 2]
    results = []
    for module in (model, streamed):
        torch.manual_seed(0)
        GLOBAL.manual_seed(0)
        results.append(torch.stack([module(X), module(X)]))
    assert torch.equal(*results)


def test_a_kept_generator_may_be_drawn_into_a_view():
    model = Model(lambda m, x, given: x + torch.zeros(2, 4, 9)[..., :8].normal_(generator=given[0]))
    streamed = fxstream.optimize(model, "min", (X, seeded(0)))
    assert torch.equal(streamed(X, seeded(5)), model(X, seeded(5)))


def forked(m, x, given):
    with torch.random.fork_rng():
        return x + torch.randn_like(x)


def restored(m, x, given):
    state = m.kept.get_state()
    first = noise(m.kept)
    m.kept.set_state(state)
    return x + first + noise(m.kept)


REFUSED = {
    "manual_seed": (lambda m, x, given: x * torch.manual_seed(0).initial_seed(), "manual_seed"),
    "initial_seed": (lambda m, x, given: x * torch.initial_seed(), "initial_seed"),
    "get_rng_state": (lambda m, x, given: x * torch.get_rng_state()[0], "get_state"),
    "fork_rng": (forked, "get_state"),
    "one of its own": (lambda m, x, given: x + noise(torch.Generator().manual_seed(0)), "generator that it makes"),
    "seeding a kept one": (lambda m, x, given: x + noise(m.kept.manual_seed(0)), "seeds a generator"),
    "a kept one's state": (restored, "seeds a generator"),
    "seeding the call's": (lambda m, x, given: x + noise(given[0].manual_seed(0)), "seeds a generator"),
    "Python's": (lambda m, x, given: x * random.random(), "random.Random"),
    "numpy's": (lambda m, x, given: x * np.random.rand(), "RandomState"),
    "a kept one of numpy's": (lambda m, x, given: x * m.rng.normal(), "numpy.random._generator.Generator"),
    "random_ from and to": (lambda m, x, given: x + torch.empty_like(x).random_(2, 5), "torch.randint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_can_not_do_is_refused_at_its_line(name):
    function, what = REFUSED[name]
    model = Model(function, kept=torch.Generator().manual_seed(0), rng=np.random.default_rng(0))
    random.seed(5)
    states = random.getstate(), torch.get_rng_state().tolist(), model.rng.bit_generator.state
    with pytest.raises(CaptureError, match=what) as caught:
        fxstream.optimize(model, "min", (X, seeded(0)))
    assert caught.value.source.split(":")[0] == __file__
    assert states == (random.getstate(), torch.get_rng_state().tolist(), model.rng.bit_generator.state)
    assert model.kept.initial_seed() == 0


def test_drawing_elsewhere_meanwhile_is_not_the_models(tmp_path):
    """As another thread may: seen at first, and not again."""
    marker = tmp_path / "drawn"

    def forward(m, x, given):
        if not marker.exists():
            marker.touch()
            random.random()
        return x * 2

    assert torch.equal(fxstream.optimize(Model(forward), "min", (X,))(X), X * 2)
    assert marker.exists()
