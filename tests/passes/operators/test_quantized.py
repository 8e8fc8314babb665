"""Operators of libraries of quantized weights against the oracle: rows are free, whatever the weights are packed as."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch._ops import OpOverload

from fxstream.passes.machine.workspace import is_known
from fxstream.passes.operators.axes import Slice, backward, is_named
from tests.passes.operators.oracle import call_of, check


def whole(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-4, 5, sizes).to(dtype)


def four_bit() -> tuple[OpOverload, tuple[object, ...]]:
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(32, 64), blocksize=64, quant_type="nf4")
    rows = torch.eye(64)[torch.randperm(64)[:12]].view(2, 6, 64)  # whose products are the same in any order of summing
    return torch.ops.bitsandbytes.gemm_4bit.default, (rows, packed, [32, 64], state.absmax, 64, "nf4")


def eight_bit() -> tuple[OpOverload, tuple[object, ...]]:
    pytest.importorskip("bitsandbytes")
    rows = whole(6, 16, dtype=torch.int8), whole(8, 16, dtype=torch.int8), torch.rand(6), torch.rand(8)
    return torch.ops.bitsandbytes.int8_scaled_mm.default, rows


def rows_quantized() -> tuple[OpOverload, tuple[object, ...]]:
    pytest.importorskip("bitsandbytes")
    return torch.ops.bitsandbytes.int8_vectorwise_quant.default, (torch.randn(6, 16),)


def quanto() -> tuple[OpOverload, tuple[object, ...]]:
    pytest.importorskip("optimum.quanto")
    scales = torch.tensor([[2.0], [0.5]] * 4)
    return torch.ops.quanto.qbytes_mm.default, (whole(2, 6, 16), whole(8, 16, dtype=torch.int8), scales)


CALLS = {"bitsandbytes 4": four_bit, "bitsandbytes 8": eight_bit, "bitsandbytes rows": rows_quantized, "quanto": quanto}


@pytest.mark.parametrize("name", CALLS)
def test_rows_are_free_and_the_workspace_is_measured(name):
    torch.manual_seed(0)
    target, args = CALLS[name]()
    call, rows = call_of(target, *args), args[0].dim() - 2
    assert is_named(target)
    for seed in range(5):
        assert check(call, Slice(rows, call.shape[rows]), Random(seed)) is not None
    assert is_known(target, call.out, args, {})


def test_packed_columns_and_columns_told_apart_are_not():
    target, args = four_bit()
    assert backward(call_of(target, *args), Slice(2, 32)) is None
    target, (rows,) = rows_quantized()
    assert backward(call_of(target, rows), Slice(1, 16)) is None
    assert backward(call_of(target, rows, 3.0), Slice(0, 6)) is None


def test_only_what_has_a_rule_is_run():
    @torch.library.custom_op("fxstream_tests::unknown", mutates_args=())
    def unknown(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("was run")

    x = torch.randn(3)
    assert not is_named(torch.ops.fxstream_tests.unknown.default)
    assert not is_known(torch.ops.fxstream_tests.unknown.default, x, (x,), {})
