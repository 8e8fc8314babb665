"""Small programs of kinds that are easy to plan wrongly: each gives what its model gives, at the lowest budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxstream
from fxstream.tools.measure import measure_peak

CASES: dict[str, tuple[Callable[..., Any], dict[str, nn.Module], list[tuple[int, ...]]]] = {
    # what is stored along an axis is shorter than what is read of it
    "a long kernel in one dimension": (
        lambda m, x: F.silu(m.conv(x * 2 + 1)),
        {"conv": nn.Conv1d(4, 4, 5, padding=2)},
        [(2, 4, 512)],
    ),
    "a longer kernel than a slice": (
        lambda m, x: m.conv(2 - x),
        {"conv": nn.Conv2d(4, 4, (7, 5), padding=1)},
        [(2, 4, 38, 19)],
    ),
    "no padding at all": (lambda m, x: m.conv(x * 2).relu(), {"conv": nn.Conv2d(4, 4, 6)}, [(1, 4, 40, 40)]),
    "two outputs, one shorter": (lambda m, x: (x * 2 + 1, m.conv(x * 2)), {"conv": nn.Conv1d(4, 4, 4)}, [(1, 4, 256)]),
    "a window of most of an axis": (lambda m, x: (x * 2)[:, :, 3:-2] + 1, {}, [(1, 4, 256)]),
    "a padded copy beside what is written over": (
        lambda m, x: ((y := (x[:, 0] + x[:, 1]) * 2).cos(), F.pad(y.exp(), [-1, 2, 1, 1, -1, 0])),
        {},
        [(2, 16, 20, 30)],
    ),
    "strided, not to the end": (lambda m, x: m.conv(x * 2) + 1, {"conv": nn.Conv1d(4, 8, 4, stride=3)}, [(1, 4, 250)]),
    # operators of several results, of which a run picks some, late, or none
    "the largest of a product": (lambda m, x: (x @ x.transpose(1, 2)).max(-1)[0], {}, [(2, 128, 16)]),
    "where the smallest is": (lambda m, x: (x @ x.transpose(1, 2)).min(-1)[1], {}, [(2, 128, 16)]),
    "both, one of them later": (
        lambda m, x: ((r := (x @ x.transpose(1, 2)).max(-1))[0].exp().sum(-1), r[1] + 1),
        {},
        [(2, 128, 16)],
    ),
    "pooling with indices": (lambda m, x: F.max_pool2d(x * 2, 2, return_indices=True), {}, [(2, 4, 32, 32)]),
    "sorted rows": (lambda m, x: (x @ x.transpose(1, 2)).sort(-1)[0].cumsum(-1).mean(-1), {}, [(2, 128, 16)]),
    "the highest of rows": (lambda m, x: (x @ x.transpose(1, 2)).topk(4, -1)[0], {}, [(2, 128, 16)]),
    "a variance with its mean": (
        lambda m, x: torch.var_mean(x.exp() @ m.w, -1),
        {"w": nn.Parameter(torch.ones(8, 64))},
        [(2, 128, 8)],
    ),
    # axes of extent one
    "a group norm of a sequence": (lambda m, x: m.norm(x) * 2, {"norm": nn.GroupNorm(8, 32)}, [(2, 32, 200)]),
    "a group norm of one group": (lambda m, x: m.norm(x * 2).relu(), {"norm": nn.GroupNorm(1, 8)}, [(2, 8, 12, 16)]),
    "group norms of rows": (lambda m, x: m.norm(x * 2) + x, {"norm": nn.GroupNorm(4, 64)}, [(200, 64)]),
    # complex numbers and views that negate
    "a product with its conjugate": (
        lambda m, x: (w := (v := torch.polar(x[..., ::2].abs(), x[..., 1::2])) * v.conj()).real + w.imag,
        {},
        [(2, 5, 6, 16)],
    ),
    "the imaginary part of a conjugate": (lambda m, x: torch.complex(x, x + 1).conj().imag * 2, {}, [(4, 32, 16)]),
    "a conjugate seen as real": (
        lambda m, x: torch.view_as_real(torch.complex(x, x + 1).conj().resolve_conj() * 2),
        {},
        [(4, 32, 16)],
    ),
    "a conjugate kept": (lambda m, x: torch.view_as_real((torch.complex(x, x) * 2).conj().clone()), {}, [(4, 32, 16)]),
    # views of windows
    "an axis stored in a permuted output": (
        lambda m, x: (
            a := x.permute(2, 1, 0, 3).reshape(14, 320),
            m.conv(a.reshape(14, 4, 10, 8).permute(2, 1, 0, 3)),
        ),
        {"conv": nn.Conv2d(4, 8, 5, padding=(2, 0), groups=4)},
        [(10, 4, 14, 8)],
    ),
    "a view after a norm that makes its input contiguous": (
        lambda m, x: m.norm(x.permute(0, 1, 3, 2) * 2).reshape(2, 8, -1).exp().mean(1),
        {"norm": nn.BatchNorm2d(8)},
        [(2, 8, 12, 10)],
    ),
    "scores in memory that is only made": (
        lambda m, x: torch.baddbmm(torch.empty(4, 64, 64), x, x.transpose(1, 2), beta=0, alpha=0.5).softmax(-1) @ x,
        {},
        [(4, 64, 16)],
    ),
}


class Program(nn.Module):
    """A function, with what it uses as attributes."""

    def __init__(self, function: Callable[..., Any], attributes: dict[str, Any]) -> None:
        super().__init__()
        self.function = (function,)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.requires_grad_(False).eval()

    def forward(self, *args: Tensor) -> Any:
        return self.function[0](self, *args)


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for each in value for leaf in leaves(each)]


@pytest.mark.parametrize("name", CASES)
def test_a_small_program_is_equal_at_the_lowest_budget(name):
    function, attributes, shapes = CASES[name]
    torch.manual_seed(0)
    model, args = Program(function, attributes), [torch.randn(shape) for shape in shapes]
    streamed = fxstream.optimize(model, "min", example_args=args)
    with torch.no_grad():
        found, wanted = leaves(streamed(*args)), leaves(model(*args))
    for got, own in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-5)
    (plan,) = streamed.plans
    assert plan.after.peak_bytes <= plan.before.peak_bytes


def rows_written(m: Any, x: Tensor) -> Tensor:
    h = x * 2
    for row in range(8):
        h[row, : row * 4] = 0
    h.diagonal().fill_(1)
    return h.exp()


def window_written(m: Any, x: Tensor) -> Tensor:
    y = x.repeat_interleave(2, 1)
    y[:-1].mul_(2)
    return y


MEASURED: dict[str, tuple[Callable[..., Any], list[Tensor], str | float]] = {
    "rows are written": (rows_written, [torch.randn(32, 2048)], "min"),
    "a window is written": (window_written, [torch.randn(2, 11, 15, 15, 4)], 0.85),
    "all of a value is written": (
        lambda m, x: (h := x.exp(), h.copy_(h * 0.5), torch.hypot(h, h + 1))[-1],
        [torch.randn(4, 16, 12, 15)],
        0.6,
    ),
    "strides of dimensions of size one": (
        lambda m, x, y: (x + 1).permute(0, 2, 3, 1).reshape(34, 14, 32) + y,
        [torch.randn(34, 14, 1, 32).permute(2, 3, 0, 1), torch.randn(34, 14, 32)],
        "min",
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_small_program_holds_what_is_planned(name):
    function, args, budget = MEASURED[name]
    model = Program(function, {})
    streamed = fxstream.optimize(model, budget, example_args=args)
    with torch.no_grad():
        measured = measure_peak(streamed, *args)
        torch.testing.assert_close(measured.result, model(*args))
    assert measured.peak_bytes == pytest.approx(streamed.plans[0].after.peak_bytes, rel=0.01, abs=1024)


def test_an_operator_alone_is_cut_where_its_workspace_makes_the_peak():
    model = Program(lambda m, x: m.up(x), {"up": nn.ConvTranspose2d(16, 8, 3, 2, (1, 0), 1)})
    x = torch.randn(3, 16, 22, 19)
    streamed = fxstream.optimize(model, "min", example_args=(x,))
    (plan,) = streamed.plans
    assert plan.after.peak_bytes < 0.8 * plan.before.peak_bytes
    with torch.no_grad():
        torch.testing.assert_close(streamed(x), model(x))


def test_recomputing_never_ends_higher():
    model = Program(
        lambda m, x: F.layer_norm(m.b(m.a(x)), (18,)),
        {
            "a": nn.Conv3d(4, 8, (4, 5, 1), padding="same", padding_mode="circular"),
            "b": nn.Conv3d(8, 4, (5, 1, 5), padding=(3, 0, 1), bias=False, padding_mode="reflect"),
        },
    )
    peaks = [
        fxstream.plan(model, (torch.randn(1, 4, 6, 15, 20),), allow_recompute=allowed).after.peak_bytes
        for allowed in (False, True)
    ]
    assert peaks[1] <= peaks[0]


@torch.library.custom_op("fxstream_tests::scale_", mutates_args=("x",))
def scale_(x: Tensor, by: float) -> None:
    x.mul_(by)


@scale_.register_fake
def _(x: Tensor, by: float) -> None:
    return None


@torch.library.custom_op("fxstream_tests::shift_", mutates_args=("x", "total"))
def shift_(x: Tensor, total: Tensor) -> Tensor:
    x.add_(1)
    total.add_(x.sum())
    return x * 2


@shift_.register_fake
def _(x: Tensor, total: Tensor) -> Tensor:
    return torch.empty_like(x)


class Written(nn.Module):
    """Custom operators that write: one after the other, to a view, to a buffer, to an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.register_buffer("total", torch.zeros(()))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x)
        before = h.mean()
        torch.ops.fxstream_tests.scale_(h, 0.5)
        doubled = torch.ops.fxstream_tests.shift_(h[:, :16], self.total)
        torch.ops.fxstream_tests.scale_(h, 3.0)
        torch.ops.fxstream_tests.scale_(x, 2.0)
        return self.b(F.silu(h)) + x, doubled.sum() + before


def test_custom_operators_that_write_are_barriers_and_write_in_order():
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Written())
    x = torch.randn(1, 4, 32, 32)
    xs = x.clone(), x.clone()
    streamed = fxstream.optimize(models[0], "min", example_args=(x.clone(),))
    assert streamed.plans[0].groups
    for _ in range(2):
        found, wanted = streamed(xs[0]), models[1](xs[1])
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close((xs[0], models[0].total), (xs[1], models[1].total))
