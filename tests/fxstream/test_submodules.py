"""Models with branches on data: none is refused, none is wrong, and what can be streamed of them is."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fxstream
from fxstream.errors import CaptureError
from fxstream.tools.measure import measure_peak

WIDTH = 16


class Block(nn.Module):
    """A block of a transformer, wide in its middle."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16 * WIDTH), nn.Linear(16 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Choosing(Block):
    """A block that looks at its input."""

    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x * 2


class Net(nn.Module):
    """Blocks, and a forward that is ``f(self, x)``."""

    def __init__(self, f, block=Block):
        super().__init__()
        self.f = f
        self.blocks = nn.ModuleList([Block(), block()])
        self.named = nn.ModuleDict({"a": Block(), "b": nn.Sequential(Block(), block())})
        self.out = nn.Linear(WIDTH, WIDTH)
        self.last, self.kept, self.seen = None, None, []

    def forward(self, x):
        return self.f(self, x)

    def all(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def once(self, x):
    return self.out(self.all(x)) if x.sum() > 0 else self.all(-x)


def within_a_block(self, x):
    return self.out(self.all(x))


def within_a_sequence(self, x):
    return self.named["b"](self.named["a"](x))


def number(self, x):
    return self.all(x) * x.abs().max().item()


def whole_number(self, x):
    for _ in range(int(x.abs().max()) % 3):
        x = self.blocks[0](x)
    return x


def until(self, x):
    while x.norm() < 60:
        x = self.blocks[0](x) * 1.5
    return x


def positions(self, x):
    rows = torch.nonzero(x[0, :, 0] > 0).flatten()
    return self.all(x[:, rows])


def masked(self, x):
    return self.all(x[:, x[0, :, 0] > 0])


def scattered(self, x):
    mask = x[..., 0] > 0
    y = x.clone()
    y[mask] = self.blocks[0](x[mask])
    return self.all(y)


def experts(self, x):
    chosen, y = x.sum(-1).argmax(0), torch.zeros_like(x)
    for expert, block in enumerate(self.blocks):
        tokens = torch.where(chosen == expert)[0]
        if len(tokens):
            y[:, tokens] = block(x[:, tokens])
    return y


def alike(self, x):
    if self.last is not None and (x - self.last).abs().mean() < 0.1 * self.last.abs().mean():
        y = x + self.kept
    else:
        y = self.all(x)
        self.kept = y - x
    self.last = x
    return self.out(y)


def checked(self, x):
    if not torch.isfinite(x).all():
        raise ValueError("not finite")
    return self.all(x)


def asserted(self, x):
    assert x.abs().max() < 1e6
    return self.all(x)


def either_kind(self, x):
    return (self.all(x), "all") if x.sum() > 0 else {"only": self.blocks[0](x)}


def early(self, x):
    for block in self.blocks:
        x = block(x)
        if x.mean() > 0.2:
            return x
    return self.out(x)


def which_block(self, x):
    return self.blocks[int(x.sum() > 0)](x)


def in_python(self, x):
    scale = 1.0 + abs(float(x.mean()))
    return self.all(x) / scale


def listed(self, x):
    weights = x.mean(dim=(0, 1)).tolist()
    return self.all(x) * max(weights) + sum(weights)


def sorted_steps(self, x):
    for index in sorted(range(2), key=lambda index: float(x[index].sum())):
        x = self.blocks[index](x)
    return x


def uniques(self, x):
    values = torch.unique(x.round())
    return self.all(x) + values.numel()


def counted(self, x):
    self.seen.append(int((x > 0).sum()))
    return self.all(x)


def shapes_of_values(self, x):
    return self.all(torch.cat([x, torch.zeros(x.shape[0], 1 + int(x[0, 0, 0] > 0), WIDTH)], dim=1))


def compared(self, x):
    return self.all(x) if torch.equal(x, x.abs()) else self.all(x.abs())


def two_branches(self, x):
    y = self.blocks[0](x) if x.sum() > 0 else self.blocks[1](x)
    return self.named["a"](y) if y.sum() > 0 else self.out(y)


def caught(self, x):
    try:
        if x.min() < -2:
            raise RuntimeError("too small")
        return self.all(x)
    except RuntimeError:
        return self.blocks[0](x.clamp(min=-2))


def while_not_close(self, x):
    y = self.blocks[0](x)
    for _ in range(3):
        y, before = self.blocks[1](y) * 0.5, y
        if torch.allclose(y, before, atol=0.5):
            break
    return y


def by_strings(self, x):
    return self.named["a" if x.mean() > 0 else "b"](x)


def inner_function(self, x):
    def step(y):
        return self.blocks[0](y) if y.sum() > 0 else y

    return step(step(x))


def with_state(self, x):
    self.kept = x if self.kept is None or x.norm() > self.kept.norm() else self.kept
    return self.all(x) + self.kept.mean()


def of_repeats(self, x):
    counts = (x[0, :, 0] > 0).long() + 1
    return self.all(torch.repeat_interleave(x, counts, dim=1))


def no_submodule(self, x):
    return self.out(x) if x.sum() > 0 else self.out(-x)


FUNCTIONS = [
    *(once, number, whole_number, until, positions, masked, scattered, experts, alike, checked, asserted, either_kind),
    *(early, which_block, in_python, listed, sorted_steps, uniques, counted, shapes_of_values, compared, two_branches),
    *(caught, while_not_close, by_strings, inner_function, with_state, of_repeats, no_submodule),
]
MODELS = {function.__name__: (function, Block) for function in FUNCTIONS}
MODELS |= {function.__name__: (function, Choosing) for function in (within_a_block, within_a_sequence)}


def inputs():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, WIDTH, generator=made)
    return [x + 0.3, x - 0.3, x - 0.301, x.abs() + 0.1]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def same(found, expected):
    found, expected = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    assert found[1] == expected[1]
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.filterwarnings("ignore:Net is no single graph", "ignore:Choosing is no single graph")
@pytest.mark.filterwarnings("ignore:Sequential is no single graph")
@pytest.mark.parametrize("name", MODELS)
def test_none_is_refused_and_none_is_wrong(name):
    function, block = MODELS[name]
    torch.manual_seed(0)
    own = Net(function, block).eval().requires_grad_(False)
    model = copy.deepcopy(own)
    streamed = fxstream.optimize(model, memory_budget="1GiB")  # which needs no slices, and is planned in no time
    for x in inputs():
        same(streamed(x), own(x))
        assert (model.last is None) == (own.last is None) and model.seen == own.seen
    assert streamed.plans or function is no_submodule
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl


def test_submodules_are_streamed_and_it_is_said():
    torch.manual_seed(0)
    model = Net(once).eval().requires_grad_(False)
    streamed, x = fxstream.optimize(model, memory_budget="min"), torch.randn(2, 512, WIDTH) + 0.3
    with pytest.warns(UserWarning, match=r"Net is no single graph.*4 submodules.*blocks\.0.*fullgraph"):
        streamed(x)
    assert len(streamed.plans) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_peak(streamed, x).peak_bytes < 0.5 * measure_peak(model, x).peak_bytes
        streamed(x + 1)
    assert len(streamed.plans) == 2


def test_a_block_that_chooses_is_streamed_by_its_own():
    model = Net(within_a_block, Choosing).eval().requires_grad_(False)
    streamed = fxstream.optimize(model, memory_budget="min")
    with pytest.warns(UserWarning) as told:
        streamed(torch.randn(2, 64, WIDTH))
    assert [str(each.message).split()[0] for each in told] == ["Net", "Choosing"] and len(streamed.plans) == 1


@pytest.mark.filterwarnings("ignore:Net is no single graph")
def test_budgets_in_bytes_hold_what_runs_beside():
    torch.manual_seed(0)
    model = Net(once).eval().requires_grad_(False)
    x = torch.randn(2, 512, WIDTH) + 0.3
    weights = sum(weight.nbytes for weight in model.parameters())
    streamed = fxstream.optimize(model, memory_budget=weights + 8 * x.nbytes)
    same(streamed(x), model(x))
    assert measure_peak(streamed, x).peak_bytes + weights + x.nbytes <= weights + 8 * x.nbytes
    with pytest.raises(fxstream.MemoryBudgetError, match="Net"):
        fxstream.optimize(model, memory_budget=weights + x.nbytes)(x)
    with pytest.warns(UserWarning, match="runs as it is held"):
        fxstream.optimize(Net(no_submodule).eval().requires_grad_(False), memory_budget=x.nbytes)(x)


def test_fullgraph_refuses():
    model, x = Net(once).eval().requires_grad_(False), torch.randn(2, 64, WIDTH)
    with pytest.raises(CaptureError, match="data-dependent"):
        fxstream.optimize(model, memory_budget="min", fullgraph=True)(x)
    with pytest.raises(CaptureError, match="data-dependent"):
        fxstream.optimize(model, memory_budget="min", example_args=(x,), fullgraph=True)
    with pytest.raises(CaptureError, match="data-dependent"):
        fxstream.plan(model, (x,))
    assert not fxstream.optimize(model, memory_budget="min", example_args=(x,)).plans


def test_what_is_refused_for_another_reason_is_refused():
    def f(self, x):
        return self.all(x) * torch.rand(2, generator=torch.Generator())[0]

    with pytest.raises(CaptureError):
        fxstream.optimize(Net(f).eval().requires_grad_(False), memory_budget="min")(torch.randn(2, 64, WIDTH))


@pytest.mark.filterwarnings("ignore:Net is no single graph")
def test_errors_are_the_models_and_leave_nothing():
    model = Net(checked).eval().requires_grad_(False)
    streamed = fxstream.optimize(model, memory_budget="min")
    with pytest.raises(ValueError, match="not finite"):
        streamed(torch.full((2, 64, WIDTH), torch.inf))
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl
    x = torch.randn(2, 64, WIDTH)
    same(streamed(x), model(x))


@pytest.mark.filterwarnings("ignore:Net is no single graph")
def test_threads_run_side_by_side():
    model = Net(once).eval().requires_grad_(False)
    streamed, wrong = fxstream.optimize(model, memory_budget="min"), []

    def run(seed):
        with torch.no_grad():
            for _ in range(5):
                x = torch.randn(2, 64 + 16 * seed, WIDTH, generator=torch.Generator().manual_seed(seed))
                if not torch.allclose(streamed(x), model(x), rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and nn.Module.__call__ is nn.Module._wrapped_call_impl
