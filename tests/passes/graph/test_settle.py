import itertools
from collections import OrderedDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fxstream
from fxstream.errors import CaptureError
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.capture import capture, roots_of_call
from fxstream.passes.graph.places import describe
from fxstream.passes.graph.settle import same_graph

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
COUNTS = {}


class Call(nn.Module):
    """A module around a function of itself and its input."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args):
        return self.function(self, *args)


def counted(self, x):
    self.n += 1
    return x * 2


def read(self, x):
    self.n += 1
    return x * self.n


def compared(self, x):
    self.n += 1
    return x * 2 if self.n > 3 else x


def every_third(self, x):
    self.o.n += 1
    return x * 2 if self.o.n % 3 == 0 else x


def in_a_global(self, x):
    COUNTS["n"] = COUNTS.get("n", 0) + 1
    return x * COUNTS["n"]


def growing(self, x):
    self.kept = x if self.kept is None else torch.cat([self.kept, x])
    return self.kept.sum(0)


def summed(self, x):
    self.log.append(x)
    return sum(self.log)


def long(self, x):
    self.log.append(1)
    return x * 2 if len(self.log) > 3 else x


def advancing(self, x):
    return x * next(self.steps)


def returned(self, x):
    self.n += 1
    return x * 2, self.n


def set_anew(self, x):
    self.weight = nn.Parameter(self.weight * 2)
    return x * self.weight


REFUSED = {
    "counter": (read, {"n": 0}, r"forward changes 0\.n of 0 \(Call\) from 0 to 1, in the next call to 2"),
    "counter returned": (returned, {"n": 0}, r"changes 0\.n of .* from 0 to 1, in the next call to 2"),
    "counter compared": (compared, {"n": 0}, r"changes 0\.n of .* from 0 to 1"),
    "counter in an object": (every_third, {"o": SimpleNamespace(n=0)}, r"changes 0\.o\.n .* from 0 to 1"),
    "counter in a global": (in_a_global, {}, r"changes COUNTS\['n'\] .* from nothing to 1, in the next call to 2"),
    "growing": (growing, {"kept": None}, r"kept .* None to a float32 tensor of shape \(2, 3\), .* shape \(4, 3\)"),
    "list": (summed, {"log": []}, r"log .* from \[\] to \[<a float32 tensor of shape \(2, 3\)>\]"),
    "length of a list": (long, {"log": []}, r"changes 0\.log .* from \[\] to \[1\]"),
    "iterator": (advancing, {"steps": itertools.count(1)}, r"advances the iterator 0.steps"),
    "parameter": (set_anew, {"weight": nn.Parameter(torch.ones(3))}, r"sets the parameter 0.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_each_call_changes_and_reads_is_refused(name):
    function, attributes, message = REFUSED[name]
    outer = nn.Sequential(Call(function, **attributes))
    with pytest.raises(CaptureError, match=message) as raised:
        capture(outer, (X,))
    assert raised.value.module_path in ("0", "")
    assert not COUNTS


def test_a_counter_that_nothing_reads():
    captured = capture(Call(counted, n=0), (X,))
    assert captured.state.effects == ()
    assert [describe(place) for place in captured.state.unread] == ["n"]


def keep(self, x):
    y = x if self.kept is None else x + self.kept
    self.kept = y * 2
    return y


def shift(self, x):
    y = x if self.old is None else x + self.old
    self.old, self.new = self.new, y * 2
    return y


def keep_in_a_queue(self, x):
    y = x + sum(self.queue)
    self.queue.append(y / 2)
    return y


def toggle(self, x):
    self.flag = not self.flag
    return x * 2 if self.flag else x


def make_once(self, x):
    if x.shape[-1] not in self.tables:
        self.tables[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1])
    return x * self.tables[x.shape[-1]]


def make_a_buffer_once(self, x):
    if "grid" not in self._buffers:
        self.register_buffer("grid", torch.arange(3.0))
    return x + self.grid


def write(self, x):
    self.o.total += x.sum()
    return x + self.o.total


def log(self, x):
    self.log["x"].append(x * 2)
    return x


def within_the_call(self, x):
    self.cache = [None]
    for _ in range(3):
        x, self.cache[0] = x if self.cache[0] is None else x + self.cache[0], x
    self.cache = [None]
    return x


WRITTEN = {
    "kept": (keep, lambda: {"kept": None}),
    "kept, and there": (keep, lambda: {"kept": torch.ones(2, 3)}),
    "shifted": (shift, lambda: {"old": None, "new": None}),
    "queue": (keep_in_a_queue, lambda: {"queue": deque([torch.zeros(2, 3)] * 2, maxlen=2)}),
    "flag": (toggle, lambda: {"flag": True}),
    "table": (make_once, lambda: {"tables": OrderedDict()}),
    "buffer": (make_a_buffer_once, dict),
    "in place": (write, lambda: {"o": SimpleNamespace(total=torch.zeros(()))}),
    "log": (log, lambda: {"log": {"x": []}}),
    "within the call": (within_the_call, dict),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_call_leaves_is_written_back(name):
    """Each call is captured in the state that the one before left."""
    function, attributes = WRITTEN[name]
    mine, its = Call(function, **attributes()), Call(function, **attributes())
    for number in range(4):
        x = X + number
        roots = roots_of_call(mine, (x,), {})
        captured = capture(mine, (x,))
        with torch.no_grad():
            found = captured.graph_module(x, *captured.state.read(roots))
            captured.changes(roots, found)
            assert torch.equal(captured.result(found), its(x))
        for attribute in attributes():
            assert repr(getattr(mine, attribute)) == repr(getattr(its, attribute))
    assert mine._buffers.keys() == its._buffers.keys()


def told_once(self, x):
    first, self.last = self.last is None, x * 2
    return x + 1, first


def asked_once(self, x, options):
    options["new"] = self.last is None
    self.last = "seen"
    return x + 1, options


def made_once(self, x):
    if self.last is None:
        self.last = [1]
        self.also = {"a": 2}
    return x * 2, True


def dropped_once(self, x):
    if hasattr(self, "last"):
        del self.last
    return x * 2, True


ONCE = {
    "told in the result": (told_once, 2),
    "told in an argument": (asked_once, 1),
    "made": (made_once, 1),
    "dropped": (dropped_once, 1),
    "within the call": (lambda self, x: (within_the_call(self, x), True), 1),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_only_the_first_call_changes_needs_another_plan_where_the_graph_shows_it(name):
    function, plans = ONCE[name]
    mine, its = Call(function, last=None), Call(function, last=None)
    streamed = fxstream.optimize(mine, "min")
    with torch.no_grad():
        for number in range(3):
            given = [({},) if function is asked_once else () for _ in range(2)]
            found, wanted = streamed(X + number, *given[0]), its(X + number, *given[1])
            assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1] and given[0] == given[1]
            assert repr(getattr(mine, "last", 0)) == repr(getattr(its, "last", 0))
    assert len(streamed.plans) == plans


def test_what_a_call_needs_no_input_for_may_be_read_by_value():
    def sized(self, x):
        if self.size is None:
            self.size = torch.tensor([2])
        return x[: self.size[0].item()]

    assert capture(Call(sized, size=None), (X,)).state.effects


def test_equal_graphs():
    one, same, other = (
        capture(Call(function), (X,)).graph_module
        for function in (lambda s, x: x * 2 + 1, lambda s, x: x * 2 + 1, lambda s, x: x * 2.0 + 1)
    )
    assert same_graph(one, same)
    assert not same_graph(one, other)
    assert not same_graph(one, capture(Call(lambda s, x: x * 2 + 1), (X[:1],)).graph_module)
    assert Inputs.of((X,), {}).count == 1


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(8, 8, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU, nn.RNN))
def test_weak_references_to_weights_are_no_state(kind):
    model, x = Recurrent(kind).eval().requires_grad_(False), torch.randn(2, 5, 8)
    streamed = fxstream.optimize(model, "min", (x,))
    torch.testing.assert_close(streamed(x), model(x))
    assert len(streamed.plans) == 1
