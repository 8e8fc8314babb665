"""Fake models: on a device that need not be there, to be planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fxstream.passes.machine.absent import let_be_guarded, numbered


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules and tensors made inside have floating point numbers of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def fake_on(device: torch.device | str, dtype: torch.dtype | None = None) -> Iterator[FakeTensorMode]:
    """Models and tensors made inside are fake and on ``device``, which need not be there: they take no memory.

    Their floating point numbers are of ``dtype``, if it is given. What is made so can be planned, and not run:

        with fxstream.fake_on("cuda", torch.float16):
            model, x = Model(), torch.randn(2, 4, 16, 72, 128)
        print(fxstream.plan(model, (x,)))

    Torch can't change the type of a fake model afterwards. Raises ``RuntimeError`` where this torch can't have fake
    tensors on such a device.
    """
    place = numbered(torch.device(device))
    let_be_guarded(place.type)
    numbers = default_dtype(dtype or torch.get_default_dtype())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, place, numbers, torch.no_grad():
        yield mode
