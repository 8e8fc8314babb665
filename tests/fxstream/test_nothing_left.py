"""After plan, optimize and errors no fake tensor is in what is the user's: a walk by the garbage collector's eyes."""

import functools
import gc
import types
from collections import deque

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import fxstream

TABLES, LATEST = {}, None


@functools.lru_cache
def ramp(size):
    return torch.linspace(0, 1, size)


class Notes:
    def __init__(self):
        self.latest = None


def hook(kept):
    def note(module, args, output):
        kept["output"] = output
        kept.setdefault("all", []).append(output)

    return note


class Leaky(nn.Module):
    """Leaves tensors wherever it can."""

    by_class: dict = {}  # noqa: RUF012

    def __init__(self, fails):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.hidden = [nn.Linear(4, 4)]
        self.notes, self.fails = Notes(), fails
        self.log, self.queue, self.late = [], deque(maxlen=2), None
        self.kept = {}
        self.linear.register_forward_hook(hook(self.kept))
        self.register_buffer("grid", None)

    @functools.cached_property
    def table(self):
        return torch.arange(4.0)

    def forward(self, x, store):
        global LATEST
        LATEST = x
        TABLES[x.shape[-1]] = ramp(4) + 1
        self.by_class["x"] = self.notes.latest = self.late = x * 2
        self.log.append(x)
        self.queue.append(x)
        self.grid = torch.ones(4)
        store["x"] = [x]
        if self.fails:
            raise RuntimeError("as it should")
        return self.hidden[0](self.linear(x)) + ramp(4) + self.table + self.grid


def fakes(roots):
    """The fake tensors that are reached from here, through this file's functions and classes and no other module's."""
    seen, waiting, found = {}, list(roots), []
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, types.ModuleType):
            continue
        seen[id(value)] = value
        if isinstance(value, FakeTensor):
            found.append(value)
        elif isinstance(value, types.FunctionType) and value.__module__ != __name__:
            waiting += [cell.cell_contents for cell in value.__closure__ or ()]
        elif not isinstance(value, type) or value.__module__ == __name__:
            waiting += gc.get_referents(value)
    assert len(seen) > 100
    return found


def plan(model, *args):
    fxstream.plan(model, args)


def optimize(model, *args):
    fxstream.optimize(model, "min", args)


def call(model, *args):
    streamed = fxstream.optimize(model, "min")
    streamed(*args)
    streamed(*args)


def no_budget(model, *args):
    with pytest.raises(fxstream.MemoryBudgetError):
        fxstream.optimize(model, 1, args)


@pytest.mark.parametrize(
    ("use", "fails"), [(plan, False), (plan, True), (optimize, True), (call, False), (no_budget, False)]
)
def test_no_fake_tensor_stays(use, fails):
    global LATEST
    TABLES.clear()
    Leaky.by_class.clear()
    ramp.cache_clear()
    LATEST = None
    model = Leaky(fails).eval().requires_grad_(False)
    x, store = torch.randn(2, 4), {}
    if fails:
        with pytest.raises(fxstream.CaptureError, match="as it should"):
            use(model, x, store)
    else:
        use(model, x, store)
    assert fakes([model, x, store, globals()]) == []
    if fails or use is not call:
        assert (TABLES, Leaky.by_class, model.log, model.kept, model.late, store, LATEST) == (
            {},
            {},
            [],
            {},
            None,
            {},
            None,
        )
        assert "table" not in vars(model)
    else:
        assert len(model.log) == len(model.kept["all"]) == 2
        assert model.log[0] is store["x"][0] is LATEST is x
        assert torch.equal(TABLES[4], ramp(4) + 1)
        assert torch.equal(model.notes.latest, x * 2)
        assert torch.equal(model.grid, torch.ones(4))
