"""Releasing: the memory that holds pages of mapped files given back, which the system reads again when they are used.

This file imports torch alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from mmap import MADV_DONTNEED, PAGESIZE

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
        first, end = -(-address // PAGESIZE), (address + size) // PAGESIZE  # other tensors share the pages at the ends
        if first < end:
            pages = ctypes.c_void_p(first * PAGESIZE), ctypes.c_size_t((end - first) * PAGESIZE)
            ctypes.CDLL(None).madvise(*pages, MADV_DONTNEED)  # refused where they are locked, and they stay then
