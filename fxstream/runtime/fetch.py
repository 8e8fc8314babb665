"""Fetches: weights whose home is a file, read into memory of their own ahead of their use.

A thread reads while kernels run; what it reads into is allocated where the graph says, and freed after the last use.
What is read is the weight as it is now: one that was changed in place in this process's memory alone is copied from
there. This file imports torch alone.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fxstream.runtime.files import MOST_AT_ONCE, Region, region_of


class Fetch:
    """A weight on its way: ``wait`` for it."""

    __slots__ = ("_copied", "_tensor")

    def __init__(self, tensor: torch.Tensor, copied: Future[None]) -> None:
        self._tensor = tensor
        self._copied = copied

    def wait(self) -> torch.Tensor:
        """The tensor, when it holds what its home does. Raises ``OSError`` where the file can't be read."""
        self._copied.result()
        return self._tensor


def fetch(home: torch.Tensor) -> Fetch:
    """Begin to copy a dense tensor from its home into memory of its own, laid out in the same way."""
    tensor = torch.empty_strided(home.shape, home.stride(), dtype=home.dtype, device=home.device)
    return Fetch(tensor, _READER.submit(_copy, home, [tensor]))


def fetched(started: Fetch) -> torch.Tensor:
    """What ``fetch`` began to copy, when it is there."""
    return started.wait()


def _copy(home: torch.Tensor, into: list[torch.Tensor]) -> None:
    """Copy into the only one of a list, which is empty then: the reading thread holds it no longer than it reads."""
    tensor = into.pop()
    size = tensor.numel() * tensor.element_size()
    region = region_of(home)
    if region is None or region.is_changed(home.data_ptr(), size):
        with torch.no_grad():
            tensor.copy_(home)
    else:
        read(region, region.offset_of(home.data_ptr()), tensor.data_ptr(), size)


def read(region: Region, offset: int, address: int, size: int) -> None:
    """Read bytes of a region's file to an address. Raises ``OSError`` where the file has them no more."""
    done = 0
    while done < size:
        length = min(size - done, MOST_AT_ONCE)
        memory = (ctypes.c_char * length).from_address(address + done)
        found = os.preadv(region.file.descriptor, [memory], offset + done)
        if not found:
            raise OSError(
                f"{region.file.path} has no more bytes at {offset + done}, where {size - done} of a weight's {size} "
                "are left: it was shortened while in use. Load the model again"
            )
        done += found


class _Reader:
    """A thread that reads in the order asked, made when it is first needed; a forked process has its own."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        if hasattr(os, "register_at_fork"):  # not where processes can't be forked
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._threads = None

    def submit(self, *work: object) -> Future[None]:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(1, thread_name_prefix="fxstream-reader")
        return self._threads.submit(*work)  # type: ignore[arg-type]


_READER = _Reader()
