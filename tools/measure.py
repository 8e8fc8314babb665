"""Measures the memory that a call takes, by the allocator's own account.

On a CPU the account is the profiler's `[memory]` events, one for every allocation and every free. On a GPU it is the
caching allocator's high-water mark, `torch.cuda.max_memory_allocated`.
"""

import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile
from torch.utils._pytree import tree_leaves

# Kineto writes progress lines to stderr at each measurement unless told not to, before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass(frozen=True)
class Measured:
    """What a call returned and what it took.

    `peak_bytes` is the most that was live at any moment of the call over what was live before it; `final_bytes` is
    what stays live after it, the result included.
    """

    result: Any
    peak_bytes: int
    final_bytes: int


@dataclass(frozen=True)
class AllocatorEvent:
    """One allocation (`delta_bytes` > 0) or free (< 0) at `time_ns`.

    `within` names what was running, from the outside in: `record_function` labels, then operators. It is empty for
    what Python frees between two operators.
    """

    time_ns: int
    delta_bytes: int
    within: tuple[str, ...]


def measure_peak(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Measured:
    """Calls `fn(*args, **kwargs)` and measures the peak of the bytes that it allocates.

    On the GPU if a parameter of `fn` or a tensor among the arguments is on one, or if it allocates there, else on the
    CPU. Run it under `torch.no_grad()`, or autograd's saved tensors count too. On the CPU a free of a tensor that was
    there before the call can go unseen, which can only raise the peak.
    """
    device = _cuda_device(fn, args, kwargs)
    if device is not None:
        return _measured_on(device, fn, args, kwargs)
    if torch.cuda.is_initialized():  # a function may have tensors of its own
        traced = _measured_on(torch.device("cuda"), allocator_trace, (fn, *args), kwargs)
        result, events = traced.result
        if traced.peak_bytes:
            return replace(traced, result=result)
    else:
        result, events = allocator_trace(fn, *args, **kwargs)
    live = list(accumulate((event.delta_bytes for event in events), initial=0))
    return Measured(result, peak_bytes=max(live), final_bytes=live[-1])


def _measured_on(device: torch.device, fn: Callable[..., Any], args: Any, kwargs: Any) -> Measured:
    """A call measured by the caching allocator of a card, from when all that was there is done until it is done."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn(*args, **kwargs)
    torch.cuda.synchronize(device)
    return Measured(
        result,
        peak_bytes=torch.cuda.max_memory_allocated(device) - before,
        final_bytes=torch.cuda.memory_allocated(device) - before,
    )


def allocator_trace(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[AllocatorEvent]]:
    """Calls `fn(*args, **kwargs)` and returns its result and what the CPU allocator did meanwhile, in time order.

    To see it node by node, run a graph under an interpreter that wraps each node in `record_function(node.name)`.
    """
    gc.collect()
    with profile(use_cpu=True, profile_memory=True) as profiler:
        result = fn(*args, **kwargs)
    trace = []
    running: list[Any] = []
    # Nested ranges may start in the same nanosecond: the one that ends later is the outer one.
    for event in sorted(profiler.kineto_results.events(), key=lambda e: (e.start_ns(), -e.end_ns())):
        while running and running[-1].end_ns() < event.start_ns():
            running.pop()
        if event.name() != "[memory]":
            running.append(event)
        elif event.device_type() == torch.profiler.DeviceType.CPU:
            within = tuple(outer.name() for outer in running)
            trace.append(AllocatorEvent(event.start_ns(), event.nbytes(), within))
    return result, trace


def _cuda_device(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    parameters = list(fn.parameters()) if isinstance(fn, torch.nn.Module) else []
    tensors = [leaf for leaf in [*parameters, *tree_leaves((args, kwargs))] if isinstance(leaf, torch.Tensor)]
    return next((tensor.device for tensor in tensors if tensor.is_cuda), None)


class WatchedMemory(threading.Thread):
    """Watches this process's memory, and ends it where what is anonymous passes a limit. All are GiB."""

    def __init__(self, limit: float) -> None:
        super().__init__(daemon=True)
        self.limit, self.anonymous, self.resident = limit, 0.0, 0.0

    def look(self) -> None:
        """Look at it now."""
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = {line.split()[0]: int(line.split()[1]) / 2**20 for line in lines if line.startswith(("Rss", "VmRSS"))}
        self.anonymous = max(self.anonymous, sizes["RssAnon:"])
        self.resident = max(self.resident, sizes["VmRSS:"])

    def run(self) -> None:
        while True:
            self.look()
            if self.anonymous > self.limit:
                print(f"ended at {self.anonymous:.2f} GiB of anonymous memory", flush=True)
                os._exit(1)
            time.sleep(0.02)
