import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize

aten = torch.ops.aten

X = torch.randn(2, 6, 4, 4)


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.function = function

    def forward(self, *inputs):
        return self.function(self, *inputs)


def aliases(tensors):
    """Which of the tensors share memory: for each, the first that it shares with."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    return [places.index(place) for place in places]


def same(before, after):
    for old, new in zip(before, after, strict=True):
        assert (old.dtype, old.shape, old.stride()) == (new.dtype, new.shape, new.stride())
        assert torch.equal(old.nan_to_num(), new.nan_to_num())
        assert torch.equal(old.signbit(), new.signbit())


def operators(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def normalized(graph_module, inputs, weights=()):
    """Normalizes, and holds the results against those of the graph as it was."""
    before = graph_module(*inputs)
    fake = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    assert normalize(graph_module) is graph_module
    graph_module.graph.lint()
    after = graph_module(*inputs)
    same(before, after)
    assert aliases([*inputs, *weights, *before]) == aliases([*inputs, *weights, *after])
    for node in graph_module.graph.nodes:  # fake values are as those of a run
        if node.op == "placeholder":
            assert any(node.meta["val"] is value for value in fake)
    results = [node.meta["val"] for node in graph_module.graph.output_node().args[0]]
    assert [(r.shape, r.stride(), r.dtype) for r in results] == [(r.shape, r.stride(), r.dtype) for r in after]
    return graph_module


def kept(function, *inputs, model=None):
    """The operators that remain of a captured function."""
    model = (model or Call(function)).eval()
    captured = capture(model, inputs)
    return operators(normalized(captured.graph_module, inputs, tuple(model.parameters())))


IDLE = {
    "clone": lambda m, x: (x + 1).clone() * 2,
    "clone of an input that is only read": lambda m, x: x.clone() * 2,
    "contiguous": lambda m, x: (x + 1).contiguous() * 2,
    "to the same dtype": lambda m, x: (x + 1).to(torch.float32, copy=True) * 2,
    "mul by 1": lambda m, x: ((x + 1) * 1) * 2,
    "mul by 1.0": lambda m, x: (1.0 * (x + 1)) * 2,
    "div by 1": lambda m, x: ((x + 1) / 1) * 2,
    "dropout": lambda m, x: nn.functional.dropout(x + 1, 0.5, m.training) * 2,
    "dropout2d": lambda m, x: nn.functional.dropout2d(x + 1, 0.5, m.training) * 2,
    "pad by nothing": lambda m, x: nn.functional.pad(x + 1, (0, 0, 0, 0), mode="replicate") * 2,
    "detach": lambda m, x: (x + 1).detach() * 2,
    "several in a row": lambda m, x: ((((x + 1).clone() * 1).contiguous() / 1.0).clone()) * 2,
    "dead code": lambda m, x: [x.exp().sum(), (x + 1) * 2][1],
    "a copy of a copy for two": lambda m, x: [y := (x + 1).clone(), y.clone() * 2][1],
}


@pytest.mark.parametrize("name", IDLE)
def test_what_is_computed_for_nothing_is_dropped(name):
    left = kept(IDLE[name], X)
    assert set(left) <= {"aten.add.Tensor", "aten.mul.Tensor"}
    assert left.count("aten.mul.Tensor") == 1
    assert left.count("aten.add.Tensor") == (name != "clone of an input that is only read")


def test_assertions_are_dropped():
    def checked(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x.flatten(1) @ x.flatten(1).t()
            with torch.autocast("cpu", enabled=False):
                return y.float() + 1

    captured = capture(Call(checked), (X,))
    assert any("_assert_tensor_metadata" in name for name in operators(captured.graph_module))
    assert not any("assert" in name for name in operators(normalized(captured.graph_module, (X,))))


def test_unread_weights_are_dropped_from_the_graph():
    captured = capture(Call(lambda m, x: [m.weight.exp(), x + 1][1]), (X,))
    nodes = normalized(captured.graph_module, (X,)).graph.nodes
    assert not [node for node in nodes if node.op == "get_attr"]


def test_unread_inputs_stay():
    """They are arguments of the call."""
    captured = capture(Call(lambda m, x, y: y + 1), (X, X + 1))
    nodes = normalized(captured.graph_module, (X, X + 1)).graph.nodes
    assert len([node for node in nodes if node.op == "placeholder"]) == 2


NEEDED = {
    "returned copy of an input": (lambda m, x: x.clone(), "aten.clone.default"),
    "returned copy of a weight": (lambda m, x: (x + 1, m.weight.clone()), "aten.clone.default"),
    "returned copy beside its source": (lambda m, x: [y := x + 1, y.clone()], "aten.clone.default"),
    "view of a copy of an input": (lambda m, x: x.clone().view(-1), "aten.clone.default"),
    "view of a copy of a weight": (lambda m, x: (x + 1, m.weight.clone().t()), "aten.clone.default"),
    "view of a copy beside its source": (lambda m, x: [y := x + 1, y.clone().view(-1)], "aten.clone.default"),
    "views of a value and of its copy": (
        lambda m, x: [(y := x + 1).view(-1), y.clone().view(-1)],
        "aten.clone.default",
    ),
    "returned product with 1": (lambda m, x: [y := x + 1, y * 1], "aten.mul.Tensor"),
    "layout": (lambda m, x: (x + 1).transpose(1, 3).contiguous(), "aten.clone.default"),
    "channels last": (lambda m, x: (x + 1).contiguous(memory_format=torch.channels_last) * 2, "aten.clone.default"),
    "dtype": (lambda m, x: (x + 1).to(torch.bfloat16).to(torch.float32), "aten._to_copy.default"),
    "float32 of integers": (lambda m, x: (x > 0).to(torch.int32) * 1.0, "aten.mul.Tensor"),
    "quotient of integers": (lambda m, x: (x > 0).to(torch.int32) / 1, "aten.div.Tensor"),
    "bool by 1": (lambda m, x: (x > 0) * 1, "aten.mul.Tensor"),
    "mul by a tensor of ones": (lambda m, x: (x + 1) * torch.ones(4), "aten.mul.Tensor"),
    "mul that broadcasts": (lambda m, x: (x.sum(1, keepdim=True) * 1).expand(2, 6, 4, 4) + 1, "aten.expand.default"),
    "mul by -1": (lambda m, x: (x + 1) * -1, "aten.mul.Tensor"),
    "expanded, made dense": (lambda m, x: (x[:, :1] + 1).expand(2, 6, 4, 4).contiguous() * 2, "aten.clone.default"),
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_must_stay(name):
    function, operator = NEEDED[name]
    assert operator in kept(function, X)


def assigned(m, x):
    out = torch.empty_like(x)
    out[..., 0::2] = (x + 1)[..., 1::2].double()
    out[..., 1::2] = x[..., 0::2]
    return out * 2


def of_another_kind(m, x):
    y = x + 1
    half = y.to(torch.bfloat16).exp()
    return [half.type_as(y) * 2, (half * 2).type_as(half) + 1]


FORGOTTEN = {
    "parts of an empty tensor": (assigned, {"aten.copy.default"}),
    "the dtype of another": (of_another_kind, {"aten.type_as.default"}),
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_no_tensor_is_held_for_its_kind_alone(name):
    function, operators_before = FORGOTTEN[name]
    assert operators_before <= {*operators(capture(Call(function), (X,)).graph_module)}
    assert operators_before.isdisjoint(kept(function, X))


def test_a_batch_norm_by_running_statistics_returns_one_value():
    """One that can be cut along pixels."""
    norm = nn.BatchNorm2d(6)
    norm.running_mean.uniform_()
    norm.running_var.uniform_(0.5, 2)
    assert kept(None, X, model=norm) == ["aten.batch_norm.default"]


def test_dropout_in_training_stays():
    captured = capture(Call(lambda m, x: nn.functional.dropout(x, 0.5, m.training) + 1).train(), (X,))
    assert "aten.bernoulli.p" in operators(normalize(captured.graph_module))


def test_a_copy_of_an_input_that_is_written_later_stays():
    def forward(m, x):
        before = x.clone()
        x.add_(1)
        return before * 2

    captured = capture(Call(forward), (X.clone(),))
    assert "aten.copy_.default" in operators(normalize(captured.graph_module))
    mine, its = X.clone(), X.clone()
    assert torch.equal(captured.graph_module(mine)[0], forward(None, its))
    assert torch.equal(mine, its)


def test_a_copy_of_a_buffer_that_is_written_later_stays():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            before = self.mean.clone()
            self.mean += x.mean((0, 1, 2))
            return before.view(2, 2)

    mine, its = Average(), Average()
    graph_module = normalize(capture(mine, (X,)).graph_module)
    for _ in range(3):
        assert torch.equal(graph_module(X)[0], its(X))
    assert torch.equal(mine.mean, its.mean)


def test_normalizing_twice_is_normalizing_once():
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Dropout(), nn.GroupNorm(2, 8), nn.SiLU()).eval()
    graph_module = capture(model, (X,)).graph_module
    once = operators(normalize(graph_module))
    assert operators(normalize(graph_module)) == once
    assert len(once) == 3


STEPS = {
    "add": lambda x: x + 0.5,
    "one": lambda x: x * 1,
    "unit": lambda x: x / 1.0,
    "clone": lambda x: x.clone(),
    "dense": lambda x: x.contiguous(),
    "dense copy": lambda x: x.clone(memory_format=torch.contiguous_format),
    "cast": lambda x: x.to(torch.float32, copy=True),
    "half": lambda x: x.to(torch.bfloat16),
    "whole": lambda x: (x * 8).to(torch.int32),
    "turn": lambda x: x.transpose(0, -1),
    "flat": lambda x: x.reshape(-1, x.shape[-1]),
    "part": lambda x: x[1:],
    "wide": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "one of": lambda x: x.sum(0, keepdim=True),
    "detach": lambda x: x.detach(),
    "alias": lambda x: aten.alias(x),
    "negative zero": lambda x: x * -0.0,
}


@st.composite
def programs(draw):
    """A list of (step, which earlier value it reads), and which values are returned."""
    count = draw(st.integers(1, 7))
    steps = [(draw(st.sampled_from(sorted(STEPS))), draw(st.integers(0, index + 1))) for index in range(count)]
    returned = draw(st.lists(st.integers(1, count + 1), min_size=1, max_size=3))
    return steps, returned


@settings(max_examples=60)
@given(programs())
def test_random_programs_keep_values_strides_and_aliases(program):
    steps, returned = program

    def run(x, weight):
        values = [x, weight]
        for step, source in steps:
            value = values[source]
            values.append(value if value.shape[0] < 2 and step == "part" else STEPS[step](value))
        return tuple(values[index] for index in returned)

    inputs = torch.randn(2, 3, 4), torch.randn(3, 2)
    graph_module = make_fx(run, tracing_mode="fake")(*inputs)
    normalized(graph_module, inputs)
