"""Effects: draws and writes keep the model's order, and none is dropped, made twice or done slice by slice."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxstream
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.effects import draws, first_write, has_effect, stays, writes, written_by
from fxstream.passes.graph.normalize import normalize
from fxstream.tools.bench import relative_l2

aten = torch.ops.aten
X = torch.randn(1, 8, 32, 32)


class Noisy(nn.Module):
    """A wide middle between narrow ends, with noise added before and after it; with a norm, if asked for."""

    def __init__(self, noise, write=None, norm=False):
        super().__init__()
        self.noise, self.write = noise, write
        self.wide, self.narrow = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 8, 1)
        self.norm = nn.GroupNorm(8, 64) if norm else nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, x):
        first = self.noise(x)
        h = self.norm(self.wide(x + self.noise(x)))
        if self.write is not None:
            self.write(h)
        return self.narrow(F.silu(h)) + first


def strided_normal(x):
    """Drawn into every second column: the kernel of dense memory draws others."""
    return torch.zeros(1, 8, 32, 64)[..., ::2].normal_()


def turned(x):
    """The same in another order of memory, as torch's kernels for draws go by it."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


DRAWS = {
    "randn_like": torch.randn_like,
    "of channels last": lambda x: torch.randn_like(x.to(memory_format=torch.channels_last)),
    "randint": lambda x: torch.randint(0, 5, x.shape).float(),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "strided normal_": strided_normal,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli of channels last": lambda x: torch.bernoulli(turned(x), 0.3),
    "bernoulli_ of channels last": lambda x: turned(x).bernoulli_(0.3),
    "strided bernoulli_": lambda x: torch.zeros(1, 8, 32, 64)[..., ::2].mT.bernoulli_(0.3),
    "dropout": lambda x: F.dropout(x, 0.3, True),
    "dropout of channels last": lambda x: F.dropout(turned(x), 0.3, True),
    "dropout of channels last, in place": lambda x: F.dropout(turned(x), 0.3, True, inplace=True),
    "alpha dropout of channels last": lambda x: F.alpha_dropout(turned(x), 0.3, True),
    "exponential_ of channels last": lambda x: turned(x).exponential_(),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, True),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    "multinomial": lambda x: torch.multinomial(x[0, 0].softmax(-1), 32)[None, None].float(),
    "two, one unread": lambda x: (torch.randn_like(x), torch.rand_like(x))[1],
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_streamed_call_draws_what_the_model_draws(name):
    model = Noisy(DRAWS[name])
    streamed = fxstream.optimize(model, 0.6, (X,))
    assert streamed.plans[0].groups
    draws_alike(model, streamed)


def test_what_is_computed_again_has_the_same_numbers():
    model = Noisy(torch.randn_like, norm=True)
    streamed = fxstream.optimize(model, "min", (X,), allow_recompute=True)
    assert streamed.plans[0].added_flops
    draws_alike(model, streamed)


def draws_alike(model, streamed):
    for module in (model, streamed):
        torch.manual_seed(1)
        module.results = [module(X), module(X)]
        module.state = torch.get_rng_state()
        if module is model:
            wanted, state = module.results, module.state
    assert max(relative_l2(got, want) for got, want in zip(streamed.results, wanted, strict=True)) < 1e-6
    assert torch.equal(streamed.state, state)


@torch.library.custom_op("test_effects::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, by: float) -> None:
    x.mul_(by)


@scale_.register_fake
def _(x, by):
    return None


def twice(h):
    scale_(h[:, ::2], 0.5)
    scale_(h, 3.0)


@pytest.mark.parametrize("write", [lambda h: scale_(h, 0.5), twice])
def test_a_custom_operator_writes_where_the_model_does(write):
    model = Noisy(torch.zeros_like, write)
    streamed = fxstream.optimize(model, "min", (X,))
    assert streamed.plans[0].groups
    assert relative_l2(streamed(X), model(X)) < 1e-6


def test_an_input_and_a_buffer_are_written_by_a_custom_operator():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.ones(3))

        def forward(self, x):
            scale_(self.seen, 0.5)
            before = x + 1
            scale_(x, 2.0)
            return before * x

    model, streamed = Writes(), Writes()
    streamed = fxstream.optimize(streamed, "min", (X.clone(),))
    assert streamed.seen.tolist() == [1, 1, 1]
    mine, its = X.clone(), X.clone()
    assert torch.equal(streamed(mine), model(its)) and torch.equal(mine, its)
    assert torch.equal(streamed.seen, model.seen)


def graph_of(function):
    class Call(nn.Module):
        def forward(self, x):
            return function(x)

    return normalize(capture(Call(), (X.clone(),)).graph_module).graph


def test_what_draws_and_what_writes_is_told_by_its_operator():
    graph = graph_of(lambda x: (torch.randn_like(x), x.add_(1))[1] * 2)
    [draw], [write] = graph.find_nodes(op="call_function", target=aten.randn.default), list(filter(writes, graph.nodes))
    assert draws(draw) and not writes(draw) and has_effect(draw) and stays(draw) and not written_by(draw)
    assert write.target is aten.copy_.default and not draws(write)
    assert [node.op for node in written_by(write)] == ["placeholder"]
    assert first_write(graph.nodes) == list(graph.nodes).index(write)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.rrelu(x, training=False),
        lambda x: F.dropout(x, 0.5, False) * 2,
    ],
)
def test_what_could_drop_out_but_does_not_draws_nothing(function):
    assert not any(map(has_effect, graph_of(function).nodes))
