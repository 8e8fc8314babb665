import copy
import gc
import pickle
import warnings
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import nn

import fxstream
from fxstream.module import StreamedModule
from fxstream.tools.measure import measure_peak

BATCH, WIDTH = 12, 16


class Block(nn.Module):
    """A feed-forward layer: its middle is wide, and can be cut along the batch."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH)
        self.scale = 1.0

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x))) * self.scale


@dataclass
class Output(BaseOutput):
    sample: torch.Tensor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("shift", torch.randn(WIDTH))
        self.register_buffer("passing", torch.randn(WIDTH), persistent=False)

    def forward(self, x, factor=1.0, *, extra=None, return_dict=True):
        for block in self.blocks:
            x = block(x)
        x = self.norm(x) * factor + self.shift + self.passing
        for value in (extra or {}).values():
            x = x + sum(value)
        return Output(sample=x) if return_dict else (x,)

    def half_of_it(self, x):
        return self.blocks[0](x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(BATCH, 64, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def streamed(model, x):
    return fxstream.optimize(model, 0.6, (x,))


def close(found, expected):
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= (1e-6 if expected.dtype == torch.float32 else 1e-2)


def test_the_same_result_within_the_budget(model, x, streamed):
    (plan,) = streamed.plans
    assert plan.groups
    assert plan.after.peak_bytes <= 0.6 * plan.before.peak_bytes
    expected = measure_peak(model, x)
    found = measure_peak(streamed, x)
    close(found.result.sample, expected.result.sample)
    assert found.peak_bytes <= 0.65 * expected.peak_bytes
    assert len(streamed.plans) == 1


def test_without_example_inputs_the_first_call_plans(model, x):
    streamed = fxstream.optimize(model, 0.6)
    assert streamed.plans == ()
    found = streamed(x)
    (plan,) = streamed.plans
    assert plan.after.peak_bytes < plan.before.peak_bytes
    close(found.sample, model(x).sample)
    assert streamed(x) is not found
    assert streamed.plans == (plan,)


def test_prepare_plans_and_runs_nothing(model, x):
    streamed = fxstream.optimize(model, 0.6)
    plan = streamed.prepare(x, return_dict=False)
    assert streamed.prepare(torch.zeros_like(x), return_dict=False) is plan
    assert streamed.plans == (plan,)
    streamed(x, return_dict=False)
    assert streamed.plans == (plan,)


def test_each_kind_of_call_has_a_plan_that_is_kept(model, x, streamed):
    """Shapes, strides, dtypes, Python arguments; what gives the same graph has the same plan."""
    calls = [
        ((x,), {}),
        ((x[:5],), {}),
        ((x.transpose(0, 1).contiguous().transpose(0, 1),), {}),
        ((x, 2.0), {}),
        ((x, 3.0), {}),
        ((x, torch.tensor(2.0)), {}),
        ((x,), {"return_dict": False}),
    ]
    assert len(streamed.plans) == 1
    for known, (args, kwargs) in enumerate(calls):
        for _ in range(2):
            found, expected = streamed(*args, **kwargs), model(*args, **kwargs)
            assert type(found) is type(expected)
            close(found[0], expected[0])
            assert len(streamed.plans) == (1, 2, 3, 4, 4, 5, 5)[known]
    plans = streamed.plans
    for args, kwargs in reversed(calls):
        streamed(*args, **kwargs)
    assert streamed.plans == plans


def test_a_tensor_instead_of_a_number_serves_all_values(model, x, streamed):
    for value in (0.5, 1.5, 2.5):
        close(streamed(x, torch.tensor(value)).sample, model(x, torch.tensor(value)).sample)
    assert len(streamed.plans) == 2


def test_a_number_that_changes_at_every_call_draws_a_warning_once(x):
    block = Block().eval().requires_grad_(False)

    class Step(nn.Module):
        def forward(self, x, timestep):
            return block(x) * timestep

    streamed = fxstream.optimize(Step(), 0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for timestep in (1, 2, 3, 4, torch.tensor(1), torch.tensor(5)):
            streamed(x, timestep)
    with pytest.warns(UserWarning, match="Pass that number as a tensor"):
        streamed(x, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streamed(x, 6)
    assert len(streamed.plans) == 7


def test_the_order_of_keywords_does_not_matter(model, x, streamed):
    streamed(x, factor=2.0, return_dict=False)
    streamed(x, return_dict=False, factor=2.0)
    streamed(return_dict=False, factor=2.0, x=x)
    assert len(streamed.plans) == 2  # one as planned by the fixture, one with a factor, x by position or by name


def test_containers_of_tensors(model, x, streamed):
    extra = {"a": [x, x * 2], "b": (torch.ones(()),)}
    for scale in (1, 2):
        given = {"a": [x * scale, x], "b": (torch.ones(()),)}
        close(streamed(x, extra=given).sample, model(x, extra=given).sample)
    assert len(streamed.plans) == 2
    close(streamed(x, extra={"a": [x]}).sample, model(x, extra={"a": [x]}).sample)
    assert len(streamed.plans) == 3
    assert set(extra) == {"a", "b"}


@pytest.mark.parametrize("return_dict", [True, False])
def test_output_classes_of_diffusers(return_dict):
    torch.manual_seed(0)
    unet = UNet2DModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )
    unet.eval().requires_grad_(False)
    streamed = fxstream.optimize(unet, "min")
    sample = torch.randn(2, 3, 16, 16)
    for timestep in (torch.tensor(3), torch.tensor(7)):
        found, expected = streamed(sample, timestep, return_dict=return_dict), unet(sample, timestep, None, return_dict)
        assert type(found) is type(expected)
        close(found[0], expected[0])
        if return_dict:
            assert found.sample is found["sample"] is found[0]
    assert len(streamed.plans) == 1


def test_bound_methods(model, x):
    streamed = fxstream.optimize(model.half_of_it, 0.7, (x,))
    close(streamed(x), model.half_of_it(x))
    assert streamed.state_dict().keys() == model.state_dict().keys()
    assert len(streamed.plans) == 1


class Configured(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width=WIDTH, sample_size=8):
        super().__init__()
        self.inner = Block()
        self.steps = 0

    def forward(self, x):
        return self.inner(x)

    def tune(self):
        self.steps += 1
        return self


class TestStandsWhereTheModelStood:
    def test_configuration_dtype_and_device(self):
        model = Configured().eval()
        streamed = fxstream.optimize(model, 0.6)
        assert streamed.config is model.config
        assert streamed.config.width == WIDTH
        assert streamed.dtype is torch.float32
        assert streamed.device == torch.device("cpu")
        assert streamed.num_parameters() == model.num_parameters()
        assert streamed.to(torch.bfloat16) is streamed
        assert streamed.dtype is model.dtype is torch.bfloat16
        assert streamed.float().dtype is torch.float32
        assert streamed.to("meta") is streamed
        assert streamed.device.type == model.device.type == "meta"

    def test_attributes_are_the_model_s(self):
        model = Configured()
        streamed = fxstream.optimize(model, 0.6)
        streamed.note = "read"
        assert model.note == "read"
        assert streamed.tune() is model
        assert streamed.steps == model.steps == 1
        streamed.steps = 5
        assert model.steps == 5
        del streamed.note
        assert not hasattr(model, "note") and not hasattr(streamed, "note")
        assert {"inner", "config", "tune", "plans", "prepare"} <= set(dir(streamed))
        with pytest.raises(AttributeError, match="nothing_like_it"):
            _ = streamed.nothing_like_it

    def test_weights_are_shared(self, model, streamed):
        mine, its = streamed.state_dict(), model.state_dict()
        assert list(mine) == list(its)
        assert all(mine[name].data_ptr() == its[name].data_ptr() for name in its)
        assert [id(p) for p in streamed.parameters()] == [id(p) for p in model.parameters()]
        assert [name for name, _ in streamed.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert [id(b) for b in streamed.buffers()] == [id(b) for b in model.buffers()]
        assert [name for name, _ in streamed.named_modules()] == [name for name, _ in model.named_modules()]
        assert list(streamed.children()) == list(model.children())
        assert streamed.blocks[0].up is model.blocks[0].up
        assert streamed.get_submodule("blocks.1.down") is model.blocks[1].down

    def test_submodules_and_parameters_are_set_on_the_model(self, model, streamed):
        streamed.extra = nn.Linear(2, 2)
        streamed.gain = nn.Parameter(torch.ones(3))
        streamed.register_buffer("offset", torch.zeros(3))
        assert model.extra is streamed.extra and model.gain is streamed.gain and model.offset is streamed.offset
        assert {"extra.weight", "gain", "offset"} <= set(model.state_dict())
        del streamed.gain
        assert not hasattr(model, "gain")

    def test_inside_another_module(self, model, x, streamed):
        around = nn.Sequential(streamed)
        state = {name: value * 2 for name, value in around.state_dict().items()}
        assert set(state) == {f"0.{name}" for name in model.state_dict()}
        around.load_state_dict(state)
        assert torch.equal(model.norm.weight, torch.full((WIDTH,), 2.0))
        around.to(torch.bfloat16)
        assert model.norm.weight.dtype is torch.bfloat16
        around.train()
        assert model.training and model.blocks[1].training and streamed.training
        close(around(x.bfloat16()).sample, model(x.bfloat16()).sample)

    def test_state_dict_hooks_run_once(self, model):
        calls = []
        model.register_state_dict_post_hook(lambda *_: calls.append("saved"))
        model.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
        streamed = fxstream.optimize(model, 0.6)
        streamed.load_state_dict(streamed.state_dict())
        assert calls == ["saved", "loaded"]
        nn.Sequential(streamed).load_state_dict(nn.Sequential(streamed).state_dict())
        assert calls == ["saved", "loaded"] * 2

    def test_training_mode(self, model, streamed):
        assert not streamed.training
        assert streamed.train() is streamed
        assert streamed.training and model.training and model.norm.training
        assert streamed.eval() is streamed
        assert not model.training
        model.train()
        assert streamed.training
        streamed.training = False
        assert not model.training and model.norm.training

    def test_hooks_on_it_run_around_it(self, model, x, streamed):
        streamed.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        streamed.register_forward_hook(lambda module, args, output: output.sample + 1)
        close(streamed(x), model(x * 2).sample + 1)
        assert len(streamed.plans) == 1

    def test_its_call_can_be_wrapped_from_outside(self, model, x, streamed):
        """As libraries that move weights between devices do."""
        inner, calls = streamed.forward, []
        streamed.forward = lambda *args, **kwargs: [calls.append(1), inner(*args, **kwargs)][1]
        close(streamed(x).sample, model(x).sample)
        assert calls == [1]
        del streamed.forward
        streamed(x)
        assert calls == [1]

    def test_printing(self, model, streamed):
        assert repr(streamed).startswith("StreamedModel(")
        assert "LayerNorm" in repr(streamed)


class TestWeightsChangedInPlace:
    """They are seen at the next call, and need no new plan."""

    @pytest.fixture(autouse=True)
    def around(self, model, x, streamed):
        before = streamed(x).sample
        yield
        after = streamed(x).sample
        assert not torch.allclose(before, after)
        close(after, model(x).sample)
        assert len(streamed.plans) == 1

    def test_load_state_dict(self, model, streamed):
        streamed.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})

    def test_load_state_dict_by_assignment(self, model):
        model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}, assign=True)

    def test_data(self, model):
        model.blocks[1].up.weight.data.mul_(1.5)

    def test_new_data(self, model):
        model.blocks[1].up.weight.data = torch.randn_like(model.blocks[1].up.weight)

    def test_a_fused_lora(self, model):
        low, high = torch.randn(4, WIDTH), torch.randn(8 * WIDTH, 4)
        with torch.no_grad():
            model.blocks[0].up.weight += 0.1 * high @ low

    def test_a_parameter_for_another(self, model):
        model.blocks[0].up.weight = nn.Parameter(torch.randn(8 * WIDTH, WIDTH), requires_grad=False)

    def test_a_buffer_for_another(self, model):
        model.shift = torch.randn(WIDTH)

    def test_a_buffer_that_is_not_saved(self, model):
        model.passing.zero_()

    def test_a_submodule_for_one_of_its_kind(self, model):
        model.blocks[0] = Block().eval().requires_grad_(False)


class Lora(nn.Module):
    """A layer injected around another."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.scaling = {"default": 1.0}
        self.active = ["default"]

    def forward(self, x):
        return self.base_layer(x) + sum(self.scaling[name] for name in self.active) * self.up(self.down(x))


class TestTheModelChanged:
    """Then it is planned anew; and where it is changed back, the plan from before is taken."""

    @pytest.fixture(autouse=True)
    def around(self, model, x, streamed):
        plans = streamed.plans
        streamed(x)
        assert streamed.plans == plans
        yield
        for _ in range(2):
            close(streamed(x.to(model.norm.weight.dtype)).sample, model(x.to(model.norm.weight.dtype)).sample)
            assert len(streamed.plans) == 2
        assert streamed.plans[0] is plans[0]

    def test_a_layer_injected(self, model):
        model.blocks[1].up = Lora(model.blocks[1].up).requires_grad_(False)

    def test_a_block_added(self, model):
        model.blocks.append(Block().requires_grad_(False))

    def test_a_block_removed(self, model):
        del model.blocks[0]

    def test_blocks_exchanged_for_another_kind(self, model):
        model.norm = nn.Identity()
        model.norm.weight = torch.ones(1)

    def test_an_attribute(self, model):
        model.blocks[0].scale = 0.5

    def test_an_attribute_of_torch_s_modules(self, model):
        model.norm.eps = 0.5

    def test_a_method(self, model):
        block = model.blocks[0]
        block.forward = lambda x: x * 2

    def test_a_hook(self, model):
        model.blocks[0].register_forward_hook(lambda module, args, output: output * 2)

    def test_one_of_several_dtypes(self, model):
        model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0].double(),))
        model.blocks[0].register_forward_hook(lambda module, args, output: output.float())
        model.blocks[0].double()

    def test_every_dtype(self, streamed):
        streamed.to(torch.bfloat16)

    def test_weights_tied(self, model):
        model.blocks[1].up.weight = model.blocks[0].up.weight

    def test_the_shape_of_a_weight(self, model):
        model.shift = torch.randn(1)


def test_what_was_changed_back_finds_its_plan(model, x, streamed):
    model.blocks[0].scale = 0.5
    streamed(x)
    up = model.blocks[0].up
    model.blocks[0].up = Lora(up).requires_grad_(False)
    streamed(x)
    model.blocks[0].up = up
    streamed.train()
    streamed(x)
    streamed.eval()
    assert len(streamed.plans) == 3  # in training mode the graph is the same
    for scale in (1.0, 0.5):
        model.blocks[0].scale = scale
        close(streamed(x).sample, model(x).sample)
    assert len(streamed.plans) == 3


def test_containers_among_the_attributes_are_watched(model, x):
    layer = model.blocks[1].up = Lora(model.blocks[1].up).requires_grad_(False)
    streamed = fxstream.optimize(model, 0.6, (x,))
    for number, change in enumerate(
        (
            lambda: layer.scaling.update(default=2.0),  # a number's value
            lambda: layer.scaling.update(other=0.5),  # one more of them
            lambda: layer.active.append("other"),
            lambda: layer.active.clear(),
            lambda: setattr(layer, "active", []),  # as the one before
        )
    ):
        change()
        close(streamed(x).sample, model(x).sample)
        assert len(streamed.plans) == (1, 2, 3, 4, 4)[number]


def test_forwards_that_keep_count():
    """Capture runs the forward once, and leaves no trace of it; a streamed call is no call of the forward."""

    class Counting(Block):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting().eval().requires_grad_(False)
    streamed = fxstream.optimize(model, 0.9)
    for _ in range(3):
        streamed(torch.randn(4, WIDTH))
    assert model.calls == 0
    assert len(streamed.plans) == 1


def test_autocast_is_part_of_the_call(model, x, streamed):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(x).sample, streamed(x).sample
        assert len(streamed.plans) == 2
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert found.dtype is expected.dtype
        assert error < 1e-2
        streamed(x)
    streamed(x)
    assert len(streamed.plans) == 2


class TestGradients:
    def test_parameters_that_require_gradients(self, model, x, streamed):
        model.blocks[0].up.weight.requires_grad_()
        with pytest.raises(fxstream.GradientError, match=r"Model.*parameters require gradients.*no_grad"):
            streamed(x)
        with torch.no_grad():
            assert not streamed(x).sample.requires_grad
        with torch.inference_mode():
            streamed(x)
        assert len(streamed.plans) == 2  # a forward may ask a weight whether it requires one
        streamed.requires_grad_(False)
        streamed(x)
        assert len(streamed.plans) == 2

    def test_inputs_that_require_gradients(self, x, streamed):
        x.requires_grad_()
        with pytest.raises(fxstream.GradientError, match="an input requires a gradient"):
            streamed(x)
        with pytest.raises(fxstream.GradientError):
            streamed(torch.zeros_like(x), extra={"a": [x]})
        with torch.no_grad():
            streamed(x)
        assert len(streamed.plans) == 1

    def test_nothing_is_planned_first(self, x):
        streamed = fxstream.optimize(Model(), 0.6)
        with pytest.raises(fxstream.GradientError):
            streamed(x)
        assert streamed.plans == ()


class TestErrorsLeaveNothingChanged:
    @pytest.fixture(autouse=True)
    def around(self, model, x, streamed):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        attributes = [dict(vars(sub)) for sub in model.modules()]
        plans = streamed.plans
        yield
        assert streamed.plans == plans
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert attributes == [dict(vars(sub)) for sub in model.modules()]
        close(streamed(x).sample, model(x).sample)
        assert streamed.plans == plans

    def test_wrong_shapes(self, streamed):
        with pytest.raises(fxstream.CaptureError, match=r"blocks\.0\.up"):
            streamed(torch.randn(BATCH, 64, WIDTH + 1))

    def test_missing_inputs(self, streamed):
        with pytest.raises(ValueError, match="'x'"):
            streamed(factor=2.0)

    def test_unknown_inputs(self, x, streamed):
        with pytest.raises(ValueError, match="'colour'"):
            streamed(x, colour="red")

    def test_inputs_that_can_not_be_compared(self, x, streamed):
        with pytest.raises(ValueError, match="ndarray"):
            streamed(x, np.array([None]))

    def test_budgets_out_of_reach(self, model, x):
        with pytest.raises(fxstream.MemoryBudgetError) as raised:
            fxstream.optimize(model, 1000, (x,))
        error = raised.value
        assert error.budget_bytes == 1000
        assert str(error.lowest_bytes) in str(error)
        assert error.plan.after.peak_bytes + error.plan.weight_bytes + error.plan.input_bytes == error.lowest_bytes
        assert error.holders == error.plan.after.holders
        reached = fxstream.plan(model, (x,), memory_budget=error.lowest_bytes)
        assert reached.after.peak_bytes <= error.plan.after.peak_bytes

    def test_budgets_out_of_reach_at_a_call(self, model, x):
        streamed = fxstream.optimize(model, 0.01)
        for _ in range(2):
            with pytest.raises(fxstream.MemoryBudgetError):
                streamed(x)
        assert streamed.plans == ()

    def test_no_model(self, x):
        with pytest.raises(TypeError, match=r"nn\.Module"):
            fxstream.optimize(lambda x: x, 0.5, (x,))


def test_inputs_are_not_kept(streamed):
    x = torch.randn(3, 64, WIDTH)
    result = streamed(x)
    there = [weakref.ref(x), weakref.ref(result.sample)]
    del x, result
    gc.collect()
    assert [ref() for ref in there] == [None, None]
    assert len(streamed.plans) == 2


def test_a_model_let_go_takes_its_plans_with_it(model, x):
    streamed = fxstream.optimize(model, 0.6, (x,))
    there = [weakref.ref(model.blocks[0].up.weight), weakref.ref(streamed)]
    plans = streamed.plans
    streamed = model = None
    gc.collect()
    assert there[1]() is None
    assert plans


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copies_are_refused_in_words(streamed, copying):
    with pytest.raises(TypeError, match=r"streamed Model.*optimize the copy"):
        copying(streamed)
    with pytest.raises(TypeError, match="optimize the copy"):
        copying(nn.Sequential(streamed))


def test_one_model_streamed_twice(model, x, streamed):
    again = fxstream.optimize(model, 0.3, (x,))
    close(again(x).sample, streamed(x).sample)
    assert again.plans[0].after.peak_bytes <= streamed.plans[0].after.peak_bytes


def test_streaming_what_is_streamed(model, x, streamed):
    """The model is planned anew for the other budget, not the loops of the first plan."""
    again = fxstream.optimize(streamed, 0.3, (x,))
    assert again.plans[0].before == streamed.plans[0].before
    assert again.plans[0].after.peak_bytes < streamed.plans[0].after.peak_bytes
    close(again(x).sample, model(x).sample)
    half = fxstream.optimize(fxstream.optimize(model.half_of_it, 0.8), 0.6)
    close(half(x), model.half_of_it(x))


def test_its_class():
    """Both its own and the model's, which what loads and saves models asks for."""
    streamed = fxstream.optimize(Configured(), 0.5)
    kind = type(streamed)
    assert issubclass(kind, StreamedModule) and StreamedModule is fxstream.StreamedModule
    assert kind in (Configured,) and kind not in (Block,) and hash(kind) == hash(Configured)
    assert isinstance(streamed, StreamedModule) and isinstance(streamed, Configured) and isinstance(streamed, nn.Module)
    assert not isinstance(streamed, Block)
    assert streamed.__class__ is Configured
    assert streamed.__module__ == Configured.__module__
