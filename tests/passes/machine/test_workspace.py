"""Workspaces hold against the allocator's own events, on the machine that runs the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import record_function
from torch.utils import _pytree as pytree

from fxstream.passes.machine import workspace
from fxstream.passes.machine.kept import folder, kept
from fxstream.passes.machine.workspace import workspace_bytes
from fxstream.tools.measure import allocator_trace

aten = torch.ops.aten

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
TYPES = (FLOAT, BFLOAT, HALF)


def randn(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
    return torch.randn(shape).to(dtype)


def predicted(target: OpOverload, *args: Any, **kwargs: Any) -> int:
    """The workspace of a node that calls the operator on these tensors."""
    graph = fx.Graph()

    def placeholder(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        node = graph.placeholder("x")
        node.meta["val"] = leaf
        return node

    nodes = pytree.tree_map(placeholder, (args, kwargs))
    node = graph.call_function(target, nodes[0], nodes[1])
    node.meta["val"] = target(*args, **kwargs)
    return workspace_bytes(node)


class Cases:
    """Calls to be held against the allocator's events, all of them in one trace."""

    def __init__(self) -> None:
        self.calls: list[tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = []

    def add(self, target: OpOverload, *args: Any, **kwargs: Any) -> None:
        """Expect the workspace of a call, to the kilobyte."""
        self.calls.append((target, args, kwargs))

    def check(self) -> None:
        @torch.no_grad()
        def run() -> list[int]:
            outputs = []
            for index, (target, args, kwargs) in enumerate(self.calls):
                with record_function(f"call {index}"):
                    out = target(*args, **kwargs)
                outputs.append(out.untyped_storage().nbytes())
                del out
            return outputs

        run()  # oneDNN keeps what it compiles
        outputs, events = allocator_trace(run)
        live, peak = [0] * len(outputs), [0] * len(outputs)
        for event in events:
            if event.within:
                index = int(event.within[0].removeprefix("call "))
                live[index] += event.delta_bytes
                peak[index] = max(peak[index], live[index])
        wrong = []
        for (target, args, kwargs), out, most in zip(self.calls, outputs, peak, strict=True):
            expected, measured = predicted(target, *args, **kwargs), max(0, most - out)
            if abs(expected - measured) > 1024:
                shapes = [(tuple(x.shape), x.stride()) for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
                wrong.append(f"{target} {shapes}: {expected} predicted, {measured} measured")
        assert not wrong, "\n".join(wrong)


@pytest.fixture
def cases() -> Iterator[Cases]:
    cases = Cases()
    yield cases
    cases.check()


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def slices(image: Tensor) -> list[Tensor]:
    """An image whole, part of its batch, part of its rows (not dense), and with its channels last."""
    last = torch.channels_last if image.ndim == 4 else torch.channels_last_3d
    views = [image, image[:1], image.narrow(-2, 1, image.shape[-2] // 2)]
    return [*views, image.contiguous(memory_format=last)]


CONVOLUTIONS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "3x3": (lambda: (randn(4, 64, 24, 32), randn(64, 64, 3, 3), randn(64)), {"padding": [1, 1]}),
    "3x3 to more": (lambda: (randn(4, 32, 24, 32), randn(64, 32, 3, 3), randn(64)), {"padding": [1, 1]}),
    "3x3 to fewer": (lambda: (randn(4, 96, 24, 32), randn(32, 96, 3, 3), None), {"padding": [1, 1]}),
    "3x3 strided": (
        lambda: (randn(4, 32, 48, 64), randn(32, 32, 3, 3), randn(32)),
        {"stride": [2, 2], "padding": [1, 1]},
    ),
    "3x3 dilated": (lambda: (randn(4, 32, 24, 32), randn(32, 32, 3, 3), None), {"padding": [2, 2], "dilation": [2, 2]}),
    "3x3 of blocks not full": (lambda: (randn(4, 40, 24, 32), randn(24, 40, 3, 3), randn(24)), {"padding": [1, 1]}),
    "1x1": (lambda: (randn(4, 96, 24, 32), randn(32, 96, 1, 1), randn(32)), {}),
    "1x1 of many": (lambda: (randn(16, 64, 24, 32), randn(64, 64, 1, 1), randn(64)), {}),
    "first": (lambda: (randn(4, 8, 24, 32), randn(32, 8, 3, 3), randn(32)), {"padding": [1, 1]}),
    "last": (lambda: (randn(8, 64, 48, 48), randn(4, 64, 3, 3), randn(4)), {"padding": [1, 1]}),
    "small": (lambda: (randn(1, 16, 8, 8), randn(16, 16, 3, 3), None), {"padding": [1, 1]}),
    "depthwise": (lambda: (randn(4, 64, 24, 32), randn(64, 1, 3, 3), None), {"padding": [1, 1], "groups": 64}),
    "grouped": (lambda: (randn(4, 64, 24, 32), randn(64, 16, 3, 3), None), {"padding": [1, 1], "groups": 4}),
    "over frames": (lambda: (randn(2, 32, 8, 24, 64), randn(32, 32, 3, 1, 1), randn(32)), {"padding": [1, 0, 0]}),
    "3x3x3": (lambda: (randn(2, 32, 5, 24, 32), randn(32, 32, 3, 3, 3), randn(32)), {"padding": [1, 1, 1]}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(cases: Cases, name: str, threads: int) -> None:
    make, options = CONVOLUTIONS[name]
    for dtype in TYPES:
        image, weight, bias = (x if x is None else x.to(dtype) for x in make())
        target = aten.conv3d.default if image.ndim == 5 else aten.conv2d.default
        for view in slices(image):
            cases.add(target, view, weight, bias, **options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_convolution_in_one_dimension(cases: Cases, dtype: torch.dtype, threads: int) -> None:
    signal, weight = randn(4, 64, 256, dtype=dtype), randn(64, 64, 3, dtype=dtype)
    for view in (signal, signal[:, :, 10:50]):
        cases.add(aten.conv1d.default, view, weight, None, padding=[1])


ROWS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "dense": lambda dtype: randn(4, 300, 320, dtype=dtype),
    "few": lambda dtype: randn(2, 5, 320, dtype=dtype),
    "matrix": lambda dtype: randn(1200, 320, dtype=dtype),
    "part of the rows": lambda dtype: randn(8, 600, 320, dtype=dtype)[:, 20:320],
    "part of the columns": lambda dtype: randn(4, 300, 640, dtype=dtype)[:, :, :320],
    "transposed": lambda dtype: randn(4, 320, 300, dtype=dtype).transpose(1, 2),
    "batch second": lambda dtype: randn(300, 4, 320, dtype=dtype).transpose(0, 1),
    "four dimensions": lambda dtype: randn(2, 8, 100, 320, dtype=dtype)[:, 1:7],
}


@pytest.mark.parametrize("name", ROWS)
def test_linear(cases: Cases, name: str, threads: int) -> None:
    for dtype in TYPES:
        for grad in (True, False):
            weight = randn(640, 320, dtype=dtype).requires_grad_(grad)
            cases.add(aten.linear.default, ROWS[name](dtype), weight, randn(640, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_matrix_products(cases: Cases, dtype: torch.dtype, threads: int) -> None:
    rows, weight = randn(512, 320, dtype=dtype), randn(320, 640, dtype=dtype)
    cases.add(aten.mm.default, rows, weight)
    cases.add(aten.addmm.default, randn(640, dtype=dtype), rows, weight)
    a, b = randn(4, 256, 64, dtype=dtype), randn(4, 64, 256, dtype=dtype)
    for x, y in ((a, b), (a[:, 3:200], b), (a, b.mT.contiguous().mT), (a[:, :, :32], b[:, :32])):
        cases.add(aten.bmm.default, x, y)
    cases.add(aten.baddbmm.default, randn(4, 256, 256, dtype=dtype), a, b)
    heads = randn(4, 256, 8, 64, dtype=dtype).transpose(1, 2)
    cases.add(aten.matmul.default, heads, heads.mT)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_attention(cases: Cases, dtype: torch.dtype, threads: int) -> None:
    attend = aten.scaled_dot_product_attention.default

    def heads(length: int, size: int = 40) -> Tensor:
        return randn(2, length, 4, size, dtype=dtype).transpose(1, 2)

    for queries, keys in ((900, 900), (256, 77), (100, 99), (60, 60), (7, 7), (300, 600)):
        cases.add(attend, heads(queries), heads(keys), heads(keys))
    odd = heads(99, 33)
    cases.add(attend, odd, odd, odd)
    q, k, v = heads(200), heads(90), heads(90)
    cases.add(attend, q, k, v, is_causal=True)
    for mask in (randn(200, 90, dtype=dtype), torch.ones(2, 1, 200, 90, dtype=torch.bool)):
        cases.add(attend, q, k, v, mask)
    # in full
    wide = heads(90, 64)
    cases.add(attend, q, k, wide)
    cases.add(attend, q, k, wide, is_causal=True)
    cases.add(attend, q, k, v.mT.contiguous().mT)
    cases.add(attend, *(x.flatten(0, 1) for x in (q, k, v)))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_norms(cases: Cases, dtype: torch.dtype) -> None:
    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=dtype)

    image = randn(4, 64, 24, 32, dtype=dtype)
    frames = randn(2, 7, 64, 12, 8, dtype=dtype).transpose(1, 2)
    for view in (*slices(image), frames, frames.contiguous(), randn(4, 768, 64, dtype=dtype).mT):
        cases.add(aten.group_norm.default, view, 32, ones(64), ones(64))
        cases.add(aten.group_norm.default, view, 32)
    rows = randn(8, 600, 64, dtype=dtype)
    for view in (rows, rows[:, 10:200], rows.transpose(0, 1), randn(8, 64, 600, dtype=dtype).mT):
        cases.add(aten.layer_norm.default, view, [64], ones(64), ones(64))
        cases.add(aten.layer_norm.default, view, [64])
        cases.add(aten.rms_norm.default, view, [64], ones(64), 1e-6)
        cases.add(aten.rms_norm.default, view, [64], None, 1e-6)
    if dtype != FLOAT:
        cases.add(aten.layer_norm.default, rows, [64], torch.ones(64), torch.ones(64))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_resampling_and_pooling(cases: Cases, dtype: torch.dtype) -> None:
    image = randn(4, 32, 24, 32, dtype=dtype)
    for view in (
        *slices(image),
        image[:, :4],
        randn(2, 32, 34, 34, dtype=dtype),
        randn(2, 32, 40, 34, dtype=dtype)[:, :, 2:36],
    ):
        cases.add(aten.upsample_nearest2d.vec, view, None, [2.0, 2.0])
        cases.add(aten._upsample_nearest_exact2d.vec, view, None, [2.0, 2.0])
        cases.add(aten.upsample_bilinear2d.vec, view, None, False, [2.0, 2.0])
        cases.add(aten.avg_pool2d.default, view, [2, 2])
        cases.add(aten.adaptive_avg_pool2d.default, view, [4, 4])
        cases.add(aten.max_pool2d.default, view, [2, 2])
    video = randn(1, 32, 4, 12, 16, dtype=dtype)
    for view in (video, video[:, :, 1:3]):
        cases.add(aten.upsample_nearest3d.vec, view, None, [2.0, 2.0, 2.0])
    frames = randn(1, 4, 32, 12, 16, dtype=dtype).transpose(1, 2)
    for view, pads in (*((view, [1] * 4) for view in slices(image)), (video[:, :, 1:3], [1] * 6), (frames, [1] * 6)):
        for mode in ("constant", "circular", "reflect", "replicate"):
            cases.add(aten.pad.default, view, pads, mode)
    signal = randn(4, 32, 640, dtype=dtype)
    cases.add(aten.conv_transpose1d.default, signal, randn(32, 32, 4, dtype=dtype), None, [2])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_pointwise_and_reductions(cases: Cases, dtype: torch.dtype) -> None:
    rows = randn(8, 600, 64, dtype=dtype)
    for view in (rows, rows[:, 10:200], rows.transpose(1, 2)):
        other = randn(*view.shape)
        for unary in (aten.gelu, aten.silu, aten.neg, aten.sigmoid, aten.exp, aten.rsqrt):
            cases.add(unary.default, view)
        for binary in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.maximum.default):
            cases.add(binary, view, view)
            cases.add(binary, view, other)
        cases.add(aten.add.Tensor, view, 1.0)
        cases.add(aten.rsub.Scalar, view, 1.0)
        cases.add(aten.pow.Tensor_Scalar, view, 2)
        cases.add(aten.gt.Tensor, view, other)
        cases.add(aten.where.self, view > 0, view, other)
        cases.add(aten.clone.default, view, memory_format=torch.contiguous_format)
        cases.add(aten._to_copy.default, view, dtype=FLOAT)
        cases.add(aten._to_copy.default, view, dtype=HALF)
        cases.add(aten.copy.default, view, other)
        cases.add(aten.cat.default, [view, view], 1)
        cases.add(aten.stack.default, [view, view], 1)
        cases.add(aten.repeat_interleave.self_int, view, 2, 0)
        cases.add(aten.cumsum.default, view, 1)
        cases.add(aten.index_select.default, view, 1, torch.arange(10))
        cases.add(aten.sum.dim_IntList, view, [1])
        cases.add(aten.amax.default, view, [1])
        cases.add(aten.var.correction, view, [1])
        cases.add(aten.mean.dim, view, [1])
        cases.add(aten.mean.dim, view, [1], dtype=FLOAT)
        cases.add(aten.softmax.int, view, -1)
        cases.add(aten.softmax.int, view, 1)
        cases.add(aten.softmax.int, view, -1, FLOAT)
    cases.add(aten.clone.default, rows[:1].expand(8, 600, 64), memory_format=torch.contiguous_format)
    cases.add(aten.mean.default, rows)


def test_what_is_too_large_grows_from_what_is_smaller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image, weight = randn(14, 32, 96, 64), randn(32, 32, 3, 3)
    rows, wide = randn(7, 300, 64).mT.contiguous().mT, randn(640, 64).requires_grad_()
    calls = [
        (aten.conv2d.default, (image, weight, None, [1, 1], [1, 1])),
        (aten.conv2d.default, (image.bfloat16(), weight.bfloat16(), None, [1, 1], [1, 1])),
        (aten.group_norm.default, (image.mT.contiguous().mT, 8)),
        (aten.linear.default, (rows, wide)),
        (aten.gelu.default, (rows.mT,)),
    ]
    direct = [predicted(target, *args) for target, args in calls]
    monkeypatch.setattr(workspace, "MOST_BYTES", 1 << 19)
    monkeypatch.setattr(workspace, "_KNOWN", {})
    monkeypatch.setenv("FXSTREAM_CACHE_DIR", str(tmp_path))
    grown = [predicted(target, *args) for target, args in calls]
    assert max(direct) > 1 << 19
    assert grown == pytest.approx(direct, rel=0.01, abs=8192)


def test_nothing_around_a_measurement_changes_it_or_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXSTREAM_CACHE_DIR", str(tmp_path))

    def measured(x: Tensor) -> list[int]:
        workspace._KNOWN.clear()
        kept("cpu", folder()).traces.clear()
        return [workspace.call_workspace_bytes(op.default, x, (x,), {}) for op in (aten.rand_like, aten.mean)]

    alone, state = measured(randn(64, 64, dtype=BFLOAT)), torch.get_rng_state()
    with torch.autograd.profiler.profile(use_cpu=True, profile_memory=True), torch.autocast("cpu"), FakeTensorMode():
        assert measured(torch.empty(64, 64, dtype=BFLOAT)) == alone
    assert torch.equal(torch.get_rng_state(), state)
    assert max(alone) > 0


SHAPE = [64, 64]
DRAWS = {
    "randn": (aten.randn.default, (SHAPE,), {"device": torch.device("cpu")}),
    "randn of a generator": (aten.randn.generator, (SHAPE,), {"generator": torch.Generator()}),
    "randint": (aten.randint.low, (0, 5, SHAPE), {"device": torch.device("cpu"), "dtype": torch.float32}),
    "randperm": (aten.randperm.default, (4096,), {}),
    "randn_like": (aten.randn_like.default, (torch.ones(64, 64),), {"device": torch.device("cpu")}),
    "bernoulli": (aten.bernoulli.p, (torch.ones(64, 64), 0.3), {}),
}


@pytest.mark.parametrize("name", DRAWS)
def test_no_generator_moves_where_a_draw_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FXSTREAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(workspace, "_KNOWN", {})
    target, args, kwargs = DRAWS[name]
    state, own = torch.get_rng_state(), kwargs.get("generator", torch.Generator()).get_state()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = mode.from_tensor(torch.ones(64, 64))
        workspace.call_workspace_bytes(target, out, args, kwargs)
    assert any("4096" in known or "64" in known for known in kept("cpu", folder()).traces)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(kwargs.get("generator", torch.Generator()).get_state(), own)


def test_a_users_operator_is_not_run() -> None:
    ran = []

    @torch.library.custom_op("workspaces::noted", mutates_args=())
    def noted(x: Tensor) -> Tensor:
        ran.append(x)
        return x.clone()

    x = randn(4)
    assert workspace.call_workspace_bytes(torch.ops.workspaces.noted.default, x, (x,), {}) == 0
    assert not workspace.is_known(torch.ops.workspaces.noted.default, x, (x,), {})
    assert not ran
