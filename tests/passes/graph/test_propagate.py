"""Fake values of nodes: those told by what is known of a call alike are those of the call itself."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.graph.propagate import arguments, evaluate, fake_tensor

aten = torch.ops.aten


def layout(value):
    return value.shape, value.stride(), value.dtype, value.device, value.untyped_storage().nbytes()


def test_calls_that_are_alike_have_the_layout_of_the_call_in_storages_of_their_own():
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    with mode, torch.no_grad():
        x.meta["val"] = torch.empty(4, 6, 8).transpose(0, 1)
        calls = [
            (aten.gelu.default, (x,)),
            (aten.sum.dim_IntList, (x, [1])),
            (aten.sum.dim_IntList, (x, [True])),  # 1 and True are equal, and may mean another thing
            (aten.to.dtype, (x, torch.float16)),
            (aten.to.dtype, (x, torch.float32)),  # x itself
            (aten.reshape.default, (x, [6, 32])),  # a copy
            (aten.reshape.default, (x, [6, 4, 2, 4])),  # a view
        ]
        for target, args in calls:
            first, second = (graph.call_function(target, args) for _ in range(2))
            given, keywords = arguments(first)
            called = target(*given, **keywords)
            values = [evaluate(first), evaluate(second)]
            assert [layout(value) for value in values] == [layout(called)] * 2
            shared = called.untyped_storage()._cdata == x.meta["val"].untyped_storage()._cdata
            storages = {value.untyped_storage()._cdata for value in (*values, x.meta["val"])}
            assert len(storages) == (1 if shared else 3)


def test_a_fake_tensor_is_as_one_made_under_its_mode():
    mode = FakeTensorMode()
    with mode:
        made = torch.empty_strided((3, 4), (1, 8), dtype=torch.bfloat16)
    found = fake_tensor(mode, (3, 4), (1, 8), torch.bfloat16, torch.device("cpu"))
    assert found.fake_mode is mode
    assert layout(found) == layout(made)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (0, 1, 3, 2), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "group_norm", "channel_shuffle", "log_sigmoid", "roll", "rolls"])
def test_values_are_laid_out_as_the_kernels_lay_them_out(name, order):
    functions = {
        "batch_norm": lambda x: nn.functional.batch_norm(x, torch.zeros(6), torch.ones(6)),
        "group_norm": lambda x: nn.functional.group_norm(x, 2),
        "channel_shuffle": lambda x: nn.functional.channel_shuffle(x, 2),
        "log_sigmoid": nn.functional.logsigmoid,
        "roll": lambda x: x.roll(1, 2),
        "rolls": lambda x: x.roll((4, 3), (2, 3)),
    }

    class Laid(nn.Module):
        def forward(self, x):
            return functions[name](x.abs())

    x = torch.randn([(2, 6, 4, 8)[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
    graph_module = normalize(capture(Laid().eval(), (x,)).graph_module)
    [result] = graph_module.graph.output_node().args[0]
    assert result.meta["val"].stride() == Laid()(x).stride()
