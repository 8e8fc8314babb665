"""Releasing: the memory that holds pages of mapped files given back, which the system reads again when they are used.

This file imports torch alone.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache

import torch

from fxstream.runtime.files import locate, region_of


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Let tensors that are mapped from files hold no memory; what was written to them, and is in no file, stays."""
    tensors = list(tensors)
    locate(tensors)
    for tensor in tensors:
        region, address = region_of(tensor), tensor.data_ptr()
        size = tensor.numel() * tensor.element_size()
        if region is None or region.is_changed(address, size):
            continue
        # Other tensors share the pages at the ends.
        first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
        _give_back(first, end - first)


def give_back(tensor: torch.Tensor) -> None:
    """Let the storage of a tensor that was spilled hold no memory; it is read again when it is used."""
    storage = tensor.untyped_storage()
    _give_back(storage.data_ptr(), storage.nbytes())


def _give_back(address: int, size: int) -> None:
    if size > 0:  # refused where they are locked, and they stay then
        _system().madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@cache
def _system() -> ctypes.CDLL:
    """The system's functions, found when they are first needed: loading them anew at each slice takes its time."""
    return ctypes.CDLL(None)
