"""Allocations: what a kernel takes of a device's memory while it runs, seen by running it.

A call is run on tensors of our own (nothing of the user's is read or written, and the state of random generators is put
back) in a thread of its own: modes that trace, fake tensors, autocast and profilers belong to threads, so neither does
what is on around us change what is measured, nor are profiles of the user's disturbed.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from threading import Thread
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _autograd, _profiler
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxstream.passes.machine.kept import Trace

T = TypeVar("T")

ALIGNMENT = 64
"""Bytes that torch's CPU allocator aligns to: a wrapped number takes less."""


def apart(function: Callable[[], T]) -> T:
    """What a function returns, run in a fresh thread with as many threads for kernels as this one."""
    result: list[T] = []
    errors: list[BaseException] = []
    threads = torch.get_num_threads()

    def run() -> None:
        try:
            torch.set_num_threads(threads)
            with torch.no_grad():
                result.append(function())
        except BaseException as error:
            errors.append(error)

    thread = Thread(target=run, name="fxstream-measure")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


def trace_of(target: OpOverload, args: Any, kwargs: Any, device: torch.device) -> Trace:
    """What a call allocates on ``device`` and releases again before it returns; its tensors stand on "meta".

    Call it ``apart``. Raises what the kernel raises.
    """
    error: Exception | None = None
    for fill in (_easy, _regular):
        try:
            given = pytree.tree_map_only(Tensor, partial(_made, fill, device), (args, kwargs))
            with _kept_generators(target, device), _traced(device) as trace:
                out = target(*given[0], **given[1])
            del out
            return tuple(trace)
        except (RuntimeError, IndexError, ValueError) as raised:
            error = error or raised
    assert error is not None
    raise error


def workspace_of(trace: Trace, made: int) -> int:
    """The most that is allocated at once, beyond what is left of it in the end, or ``made`` where more is left.

    Some kernels return a tensor in a storage that is larger than it. A number that becomes a tensor is not counted.
    """
    live = list(accumulate(trace, initial=0))
    beyond = max(live) - min(live[-1], made)
    return beyond if beyond >= ALIGNMENT else 0


@contextmanager
def _traced(device: torch.device) -> Iterator[list[int]]:
    """The trace of what is run inside."""
    trace: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield trace
        torch.cuda.synchronize(device)
        peak, after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        trace += [peak - before, after - peak]
        return
    config = _profiler.ProfilerConfig(
        _profiler.ProfilerState.CPU, False, True, False, False, False, _profiler._ExperimentalConfig()
    )
    _autograd._enable_profiler_legacy(config)
    try:
        yield trace
    finally:
        threads = _autograd._disable_profiler_legacy()
    trace += [event.cpu_memory_usage() for events in threads for event in events if event.kind() == "memory_alloc"]


def _room(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of zeros with this one's size and strides. On the CPU its pages are taken when they are first used."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    if device.type == "cpu" and size:
        buffer = torch.frombuffer(mmap.mmap(-1, size * like.element_size()), dtype=like.dtype)
    else:
        buffer = torch.zeros(size, dtype=like.dtype, device=device)
    room = buffer.new_empty(0).set_(buffer.untyped_storage(), 0, like.shape, like.stride())  # kernels ask for views
    return room.requires_grad_(like.requires_grad)


def _made(fill: Callable[[Tensor], Tensor], device: torch.device, like: Tensor) -> Tensor:
    return fill(_room(like, device))


def _easy(tensor: Tensor) -> Tensor:
    """Zeros, which are indices of anything and cost no time; masks take in all."""
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor


def _regular(tensor: Tensor) -> Tensor:
    """Ones, and matrices that have an inverse, for kernels that refuse zeros."""
    tensor.fill_(1)
    if tensor.is_floating_point() and tensor.ndim > 1:
        tensor.diagonal(dim1=-2, dim2=-1).fill_(tensor.shape[-1] + 1)
    return tensor


@contextmanager
def _kept_generators(target: OpOverload, device: torch.device) -> Iterator[None]:
    """Leave torch's generators as they are, where an operator draws: other threads may draw meanwhile, too."""
    draws = torch.Tag.nondeterministic_seeded in target.tags
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=draws):
        yield
