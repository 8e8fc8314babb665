import gc
import inspect
import logging
import re
import warnings
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNetSpatioTemporalConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import BaseOutput
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from fxstream.errors import CaptureError
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.capture import capture, module_path

Pair = namedtuple("Pair", "left right")


@dataclass
class Plain:
    """A dataclass that pytree has not heard of."""

    sample: torch.Tensor
    scale: float = 1.0
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Nested:
    inner: Plain
    name: str


@dataclass(frozen=True, slots=True)
class Slotted:
    sample: torch.Tensor


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    extra: torch.Tensor | None = None


class Distribution:
    """An object that is no container, with tensors in it, as autoencoders return."""

    def __init__(self, mean):
        self.mean = mean
        self.std = mean.exp()
        self.deterministic = False

    def mode(self):
        return self.mean


class Call(nn.Module):
    """A module around a function of itself and its inputs."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def run(target, *args, **kwargs):
    """Captures a call, runs the graph on the same inputs."""
    captured = capture(target, args, kwargs)
    with torch.no_grad():
        return captured.result(captured.graph_module(*Inputs.of(args, kwargs).tensors))


def assert_same(found, expected):
    """Same structure, same classes, same values to the bit, same strides."""
    found_leaves, found_spec = pytree.tree_flatten(found)
    leaves, spec = pytree.tree_flatten(expected)
    assert found_spec == spec
    for mine, its in zip(found_leaves, leaves, strict=True):
        assert type(mine) is type(its)
        if isinstance(its, torch.Tensor):
            assert (mine.dtype, mine.shape, mine.stride()) == (its.dtype, its.shape, its.stride())
            assert torch.equal(mine, its)
        else:
            assert mine == its


def check(target, *args, **kwargs):
    with torch.no_grad():
        expected = target(*args, **kwargs)
    assert_same(run(target, *args, **kwargs), expected)


X, Y = torch.randn(2, 3, 4)


ARGUMENTS = {
    "positional": ((X, Y), {}),
    "keyword": ((X,), {"y": Y}),
    "default": ((X,), {}),
    "None": ((X, None), {}),
    "scalar": ((X,), {"y": 2}),
    "float": ((X,), {"y": 2.5}),
    "bool": ((X,), {"negate": True}),
    "string": ((X,), {"mode": "relu"}),
    "list": (([X, Y],), {}),
    "dict": (({"b": X, "a": [Y, 3.0, None]},), {}),
    "namedtuple": ((Pair(X, Y),), {}),
    "ordered dict": ((OrderedDict(b=X, a=Y),), {}),
    "dataclass": ((Plain(X, 2.0, {"y": Y}),), {}),
    "nested dataclass": ((Nested(Plain(X), "a"),), {}),
    "no tensor": ((3,), {"y": 4}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    args, kwargs = ARGUMENTS[name]

    class Sum(nn.Module):
        """Adds whatever numbers it is given."""

        def add(self, total, value):
            if isinstance(value, Nested):
                value = value.inner
            if isinstance(value, Plain):
                return self.add(total + value.sample * value.scale, value.more)
            if isinstance(value, dict):
                value = [value[name] for name in sorted(value)]
            if isinstance(value, (list, tuple)):
                for item in value:
                    total = self.add(total, item)
                return total
            return total if value is None else total * 3 + value

        def forward(self, x, y=None, *, negate=False, mode="none"):
            total = self.add(self.add(torch.ones(()), x), y)
            total = -total if negate else total
            return total.relu() if mode == "relu" else total

    check(Sum(), *args, **kwargs)


RESULTS = {
    "tensor": lambda x, y: x + y,
    "tuple": lambda x, y: (x + y, y - x),
    "one-tuple": lambda x, y: (x + y,),
    "list and dict": lambda x, y: [{"a": x + y, "b": [y * 2]}, None, 3, "text"],
    "namedtuple": lambda x, y: Pair(x * y, y * x),
    "dataclass": lambda x, y: Output(sample=x + y),
    "the same tensor twice": lambda x, y: [x + y] * 2,
    "python numbers": lambda x, y: (x.shape[0], x.numel() * 0.5, x.is_contiguous()),
    "nothing": lambda x, y: None,
    "an input": lambda x, y: (y, x),
    "views": lambda x, y: (x.t(), (x + y)[:, 1:3], (x + y).t()),
    "integers": lambda x, y: (x > y, (x * 10).int(), torch.arange(3)),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results(name):
    check(Call(lambda self, x, y: RESULTS[name](x, y)), X, Y)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Plain(x + 1, 3.0, {"y": x * 2}),
        lambda x: Nested(Plain(x + 1), "name"),
        lambda x: [Slotted(x + 1)],
        lambda x: Output(sample=x + 1, extra=x * 2),
        lambda x: Transformer2DModelOutput(sample=x + 1),
        lambda x: (Distribution(x * 2), 1),
    ],
    ids=["dataclass", "nested dataclass", "slots", "diffusers output", "diffusers class", "object"],
)
def test_result_classes(make):
    found, expected = run(Call(lambda self, x: make(x)), X), make(X)
    assert type(found) is type(expected)

    def parts(value):
        """Attributes all the way down."""
        if isinstance(value, (list, tuple)):
            return [parts(item) for item in value]
        if isinstance(value, dict):
            return {name: parts(item) for name, item in value.items()}
        if isinstance(value, (Plain, Nested, Distribution)):
            return parts(vars(value))
        return value.sample if isinstance(value, Slotted) else value

    assert_same(parts(found), parts(expected))
    if isinstance(found, Output):
        assert torch.equal(found.sample, found[0])
        assert torch.equal(found["extra"], found[1])
    if isinstance(found, tuple):
        assert found[0].mode() is found[0].mean


def test_weights_are_the_model_s_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    captured = capture(model, (X,))
    nodes = [node for node in captured.graph_module.graph.nodes if node.op == "get_attr"]
    assert {node.target for node in nodes} >= {"model.0.weight", "model.1.running_mean"}
    with torch.no_grad():
        model[0].weight.mul_(3)
        model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
        model[1].running_mean = torch.ones(4)
        model[0].bias = nn.Parameter(torch.ones(4))
        assert torch.equal(captured.graph_module(X)[0], model(X))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.again = self.head

        def forward(self, ids):
            return self.again(self.head(self.embed(ids)) @ self.head.weight)

    model = Tied()
    captured = capture(model, (torch.tensor([[0, 3], [6, 1]]),))
    nodes = captured.graph_module.graph.nodes
    assert len([node for node in nodes if node.op == "get_attr" and node.users]) == 1
    check(model, torch.tensor([[0, 3], [6, 1]]))


def test_constants():
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.randn(4))
            self.register_buffer("derived", torch.randn(4), persistent=False)
            self.register_buffer("absent", None)
            self.plain = torch.randn(4)

        def forward(self, x):
            return x * self.kept + self.derived - self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4)

    check(Constants(), X)


def test_integer_weights_and_mixed_dtypes():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randint(-8, 8, (4, 4), dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))

        def forward(self, x):
            return x @ (self.weight.to(torch.float32) * self.scale)

    check(Quantised(), X)


def test_inputs_are_written_as_in_eager_mode():
    def forward(self, x, y):
        flat = x.view(-1)
        before = x.clone()
        x.mul_(2)
        y[1] = x[0]
        return x, flat, before, x.add_(1)

    model = Call(forward)
    mine, its = (X.clone(), Y.clone()), (X.clone(), Y.clone())
    with torch.no_grad():
        expected = model(*its)
    captured = capture(model, mine)
    assert torch.equal(mine[0], X)  # capture computes nothing
    found = captured.result(captured.graph_module(*mine))
    assert_same(found, expected)
    assert_same(mine, its)
    assert found[0] is mine[0]


def test_buffers_are_written_as_in_eager_mode():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("total", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3, 4))

        def forward(self, x):
            self.total += x.sum()
            self.last = x + self.last
            return self.norm(x) * self.total, self.last

    mine, its = Counter(), Counter()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    captured = capture(mine, (X,))
    assert_same(dict(mine.state_dict()), before)
    last = mine.last
    for _ in range(3):
        with torch.no_grad():
            expected = its(X)
            found = captured.result(captured.graph_module(X))
        assert_same(found, expected)
        assert_same(dict(mine.state_dict()), dict(its.state_dict()))
    assert mine.last is last


def test_a_buffer_that_changes_its_shape():
    def forward(self, x):
        self.cache = torch.cat([self.cache, x])
        return self.cache

    model = Call(forward)
    model.register_buffer("cache", torch.zeros(1, 4))
    with pytest.raises(CaptureError, match="cache"):
        capture(model, (X,))
    assert torch.equal(model.cache, torch.zeros(1, 4))


def test_randomness_is_drawn_at_each_call():
    captured = capture(Call(lambda self, x: x + torch.randn_like(x) + torch.rand(4)), (X,))
    torch.manual_seed(0)
    first, second = captured.graph_module(X)[0], captured.graph_module(X)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(X + torch.randn_like(X) + torch.rand(4), first)


def test_autocast_inside_the_model():
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = self.linear(x)
            with torch.autocast("cpu", enabled=False):
                return half, self.linear(half.float())

    check(Call(forward), X)


def test_no_grad_and_inference_mode_inside_the_model():
    def forward(self, x):
        with torch.no_grad():
            x = self.linear(x)
        with torch.inference_mode():
            return self.linear(x)

    check(Call(forward), X)


def test_hooks_are_captured():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(model, X)


def test_bound_methods():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

        def encode(self, x, *, scale=1.0):
            return self.down(x) * scale

        def decode(self, z):
            return self.up(z)

        def forward(self, x):
            return self.decode(self.encode(x))

    model = Coder()
    check(model.encode, X, scale=2.0)
    check(model.decode, torch.randn(3, 2))
    nodes = capture(model.decode, (torch.randn(3, 2),)).graph_module.graph.nodes
    assert {module_path(node) for node in nodes if node.op == "call_function"} == {"up"}


def test_a_vae_by_its_methods():
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2)
    vae.eval()
    latents = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        assert torch.equal(run(vae.decode, latents).sample, vae.decode(latents).sample)
        assert torch.equal(run(vae.decode, latents, return_dict=False)[0], vae.decode(latents, return_dict=False)[0])
        image = torch.randn(1, 3, 8, 8)
        found, expected = run(vae.encode, image).latent_dist, vae.encode(image).latent_dist
    assert type(found) is type(expected)
    assert torch.equal(found.mode(), expected.mode())
    draws = [dist.sample(torch.Generator().manual_seed(1)) for dist in (found, expected)]
    assert torch.equal(*draws)


def test_a_unet_and_its_output_class():
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=8,
        num_attention_heads=2,
    ).eval()
    args = (torch.randn(1, 2, 8, 4, 6), torch.tensor(1.0), torch.randn(1, 1, 8), torch.rand(1, 3))
    captured = capture(model, args)
    with torch.no_grad():
        expected = model(*args)
        found = captured.result(captured.graph_module(*args))
    assert type(found) is type(expected)
    assert torch.equal(found.sample, expected.sample)
    paths = {module_path(node) for node in captured.graph_module.graph.nodes if node.op == "call_function"}
    assert paths <= {name for name, _ in model.named_modules()}
    assert "down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q" in paths


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


@pytest.mark.parametrize("inputs", ["fake", "real"])
def test_a_fake_model(inputs):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = mlp()
        fake = torch.randn(1 << 40, 4)  # nothing is allocated
    x = fake if inputs == "fake" else X
    captured = capture(model, (x,))
    (result,) = captured.graph_module.graph.output_node().args[0]
    assert isinstance(result.meta["val"], FakeTensor)
    assert result.meta["val"].shape == x.shape
    assert result.meta["val"].device.type == "cpu"


def test_a_fake_mode_that_is_on():
    with FakeTensorMode():
        model, x = mlp(), torch.randn(3, 4)
        captured = capture(model, (x,))
    (result,) = captured.graph_module.graph.output_node().args[0]
    assert isinstance(result.meta["val"], FakeTensor)


def test_a_meta_model():
    with torch.device("meta"):
        model, x = mlp(), torch.randn(1 << 40, 4)
    captured = capture(model, (x,))
    (result,) = captured.graph_module.graph.output_node().args[0]
    assert result.meta["val"].shape == x.shape
    assert result.meta["val"].device.type == "meta"


def test_an_example_s_tensors_are_let_go():
    x = torch.randn(3, 4)
    there = weakref.ref(x)
    captured = capture(mlp(), (x,))
    del x
    gc.collect()
    assert there() is None
    assert captured.graph_module is not None


def line_of(function, text):
    """``file:line`` of the line of a function that holds the text."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [first + i for i, line in enumerate(lines) if text in line]
    return f"{__file__}:{number}"


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Item(nn.Module):
    def forward(self, x):
        return x * x.amax().item()


class Shape(nn.Module):
    def forward(self, x):
        return x[x > 0]


class Bug(nn.Module):
    def forward(self, x):
        return x.no_such_method()


class Processor:
    """Not a module, as diffusers' attention processors are not."""

    def __call__(self, attention, x):
        return torch.cat([x, x[:1, :2]])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class Cond(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(x)


FAILURES = {
    "branch": (Branch, "", Branch.forward, "x.sum() > 0", "torch.where"),
    "item": (Item, "", Item.forward, ".item()", "depends on tensors' values"),
    "shape": (Shape, "", Shape.forward, "x[x > 0]", "depends on tensors' values"),
    "bug": (Bug, "", Bug.forward, "no_such_method", "has no attribute 'no_such_method'"),
    "processor": (Attention, "", Processor.__call__, "torch.cat", "runs on these inputs by itself"),
    "cond": (Cond, "", None, None, "cond has graphs of its own"),
    "library module": (Wide, ".linear", Wide.forward, "self.linear(x)", "runs on these inputs by itself"),
}


def test_what_is_written_to_the_data_of_a_tensor_is_seen():
    class Padded(nn.Module):
        def forward(self, x):
            wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
            wide.data[..., ::2].copy_(x)
            return wide + 1

    captured = capture(Padded(), (X,))
    assert torch.equal(captured.graph_module(X)[0], Padded()(X))


@pytest.mark.parametrize("name", FAILURES)
def test_errors_name_the_module_and_the_line(name, capfd, caplog):
    kind, inner, function, text, advice = FAILURES[name]

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.ReLU(), kind())])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Around()
    with caplog.at_level(logging.WARNING), pytest.raises(CaptureError) as raised:
        capture(model, (X,))
    error, message = raised.value, str(raised.value)
    assert error.module_path == "blocks.1.1" + inner
    assert f"could not capture Around as one graph: in {error.module_path}" in message
    assert advice in message
    if function is not None:
        assert error.source == line_of(function, text)
        assert error.source in message
        assert text in message.splitlines()[1]
    assert capfd.readouterr() == ("", "")  # torch has nothing to add
    assert not caplog.records


def test_errors_in_a_bound_method():
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Branch()

        def decode(self, z):
            return self.inner(z)

    with pytest.raises(CaptureError) as raised:
        capture(Coder().decode, (X,))
    assert raised.value.module_path == "inner"


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((), {}, "'x'"),
        ((X,), {}, "'y'"),
        ((X, Y, 1), {}, "too many positional"),
        ((X, Y), {"z": 1}, "'z'"),
        ((X,), {"x": X, "y": Y}, "'x'"),
    ],
)
def test_inputs_that_do_not_fit_the_signature(args, kwargs, named):
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(ValueError, match=re.escape(named)) as raised:
        capture(Two(), args, kwargs)
    assert "Two" in str(raised.value)


@pytest.mark.parametrize("target", [torch.sin, lambda x: x, "model", nn.Linear, X.sum])
def test_only_modules_and_their_methods(target):
    with pytest.raises(TypeError, match=r"nn\.Module"):
        capture(target, (X,))


class Restless(nn.Module):
    """Changes all that it can get hold of."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.dropout = nn.Dropout()
        self.register_buffer("steps", torch.zeros(()))
        self.calls = 0
        self.log = ["start"]
        self.nested = {"a": [1], "b": OrderedDict(c=2)}
        self.alias = self.nested["a"]

    def forward(self, x, width=4):
        self.calls += 1
        self.log.append("call")
        self.nested["a"].append(2)
        self.nested["b"]["d"] = 3
        self.late = "new"
        self.steps += 1
        self.linear.weight.requires_grad_(False)
        self.dropout.eval()
        self.train(not self.training)
        return self.frozen(self.linear(x))[:, torch.arange(width)] + torch.ones(4)


@pytest.mark.parametrize("width", [4, 3])
@pytest.mark.parametrize("training", [False, True])
def test_capture_changes_nothing_of_the_model(width, training):
    model = Restless().train(training)
    model.dropout.eval()
    log, nested, alias = model.log, model.nested, model.alias
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    if width == 4:
        capture(model, (X, width))
    else:
        with pytest.raises(CaptureError):
            capture(model, (X, width))
    assert_same(dict(model.state_dict()), state)
    assert tensors == {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    assert [sub.training for sub in model.modules()] == [training, training, training, False]
    assert model.linear.weight.requires_grad
    assert not model.frozen.weight.requires_grad
    assert model.calls == 0
    assert not hasattr(model, "late")
    assert (model.log, model.nested, model.alias) == (["start"], {"a": [1], "b": OrderedDict(c=2)}, [1])
    assert model.log is log and model.nested is nested and model.alias is alias is nested["a"]


def test_grad_mode_and_warnings_are_left_as_they_were():
    filters = list(warnings.filters)
    capture(mlp(), (X,))
    with pytest.raises(CaptureError):
        capture(Branch(), (X,))
    assert torch.is_grad_enabled()
    assert list(warnings.filters) == filters


def key(*args, **kwargs):
    return Inputs.of(args, kwargs).key()


def test_keys_of_calls_that_one_plan_serves():
    assert key(X, 1, a=Y, b="s") == key(Y, 1, b="s", a=X)
    assert hash(key(X, {"a": [Y]}, m=Plain(X))) == hash(key(Y, {"a": [X]}, m=Plain(Y)))
    assert key(X, float("nan")) == key(X, float("nan"))
    assert key(X, torch.float32, None, "s") == key(Y, torch.float32, None, "s")
    assert hash(key(Output(sample=X))) == hash(key(Output(sample=Y)))


@pytest.mark.parametrize(
    "other",
    [
        key(X[:2], 1),
        key(X.double(), 1),
        key(X.to("meta"), 1),
        key(torch.empty(4, 3).t(), 1),
        key(X, 2),
        key(X, 1.0),
        key(X, True),
        key(X, torch.tensor(1)),
        key(X, y=1),
        key(X, None),
        key([X], 1),
        key((X,), 1),
        key(Plain(X), 1),
        key(X, 1, None),
    ],
)
def test_keys_of_calls_that_need_plans_of_their_own(other):
    assert key(X, 1) != other


def test_zeros_of_either_sign_are_not_one_argument():
    assert key(X, 0.0) != key(X, -0.0)


def test_arguments_that_can_not_be_told_apart():
    with pytest.raises(ValueError, match="ndarray"):
        key(X, np.array([None]))


def test_arguments_are_told_apart_by_what_is_in_them():
    given = SimpleNamespace(scale=1.0, inner=[{"a": 1}])
    before = key(X, given)
    assert key(X, given) == before
    given.inner[0]["a"] = 2
    assert key(X, given) != before
    assert key(X, bytearray(b"12")) == key(X, bytearray(b"12")) != key(X, bytearray(b"21"))
    assert key(X, np.int64(1)) == key(X, np.int64(1)) != key(X, np.int64(2))


def test_a_list_that_is_given_twice_is_one():
    def appended(module, x, first, second):
        first.append(x + 1)
        return second[-1] * 2, len(second)

    both = []
    captured = capture(Call(appended), (X, both, both))
    assert captured.inputs.key() != Inputs.of((X, [], []), {}).key()
    found = captured.graph_module(X)
    assert torch.equal(captured.result(found)[0], (X + 1) * 2) and captured.result(found)[1] == 1


def test_a_list_that_holds_itself_is_refused():
    def itself(module, x):
        found = [x]
        found.append(found)
        return found

    with pytest.raises(CaptureError, match="what forward returns holds itself"):
        capture(Call(itself), (X,))


def test_an_iterator_is_no_argument():
    with pytest.raises(CaptureError, match="list_iterator"):
        Inputs.of((X, iter([1])), {})


class ChannelsLast(nn.Module):
    """A convolution that is large enough for oneDNN, which keeps its input's order of channels, between views."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32)

    def forward(self, x):
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).reshape(x.shape[0], -1, x.shape[2])


def test_layouts_are_those_of_a_real_run():
    """torch.export traces without oneDNN, where the convolution's result is contiguous and the reshape a view."""
    model, x = ChannelsLast().requires_grad_(False), torch.randn(1, 32, 40, 32)
    graph_module = capture(model, (x,)).graph_module
    seen = {}

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.op == "call_function":
                seen[n.name] = (value.stride(), n.meta["val"].stride())
            return value

    [result] = Run(graph_module).run(x)
    assert torch.equal(result, model(x))
    assert [real for real, _ in seen.values()] == [fake for _, fake in seen.values()]
    convolution = next(node for node in graph_module.graph.nodes if node.target is torch.ops.aten.conv2d.default)
    assert convolution.meta["val"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_results_of_multihead_attention_are_laid_out_as_in_eager_mode(batch_first, training):
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).requires_grad_(False).train(training)
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first).requires_grad_(False).train(training)
    calls = [lambda _, x: attention(x, x, x), lambda _, x: attention(x, x + 0, x)[0], lambda _, x: layer(x)]
    for call, module in zip(calls, (attention, attention, layer), strict=True):
        model = Call(call).requires_grad_(False)
        model.inside, x = module, torch.randn(3, 7, 16)
        captured, wanted = capture(model, (x,)), pytree.tree_leaves(model(x))
        for found, own in zip(captured.graph_module(x), wanted, strict=True):
            assert found.stride() == own.stride() and torch.allclose(found, own, atol=1e-6)


def test_attention_with_graphs_of_its_own_is_named():
    from torch.nn.attention.flex_attention import flex_attention

    class Flexible(nn.Module):
        def forward(self, x):
            y = x * 2
            return flex_attention(y, y, y)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Flexible()

        def forward(self, x):
            return self.inner(x) + 1

    with pytest.raises(CaptureError, match=r"return flex_attention\(y, y, y\)\n  flex_attention has graphs") as caught:
        capture(Outer(), (torch.randn(1, 2, 128, 16),))
    assert caught.value.module_path == "inner"
    assert caught.value.source.startswith(__file__)


@pytest.mark.parametrize("layout", ["jagged", "strided", "sparse"])
def test_tensors_that_are_not_dense_are_refused(layout):
    class Nests(nn.Module):
        def forward(self, x):
            return torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged).to_padded_tensor(0.0)

    rows = [torch.randn(3, 4), torch.randn(2, 4)]
    nested = torch.nested.nested_tensor(rows, layout=getattr(torch, layout)) if layout != "sparse" else None
    with pytest.raises(CaptureError, match=f"input tensor 0 is {'sparse_coo' if nested is None else 'nested'}"):
        capture(nn.Identity(), (rows[0].to_sparse() if nested is None else nested,))
    with pytest.raises(CaptureError, match=r"input tensor 0 is a view of conjugates .*pass x.resolve_conj\(\)"):
        capture(nn.Identity(), (torch.complex(rows[0], rows[0]).conj(),))
    with pytest.raises(CaptureError, match="nested_tensor") as caught:
        capture(Nests(), (torch.randn(2, 4, 4),))
    assert caught.value.source.startswith(__file__)
