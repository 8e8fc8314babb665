"""Spilling: tensors moved from memory into a file that they are mapped from, so that they hold memory no more.

The file has no name: it is gone with the last tensor in it, or with the process. What is written to a spilled tensor
is written to the file. This file imports torch alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from itertools import accumulate

import torch

from fxstream.runtime.files import OpenFile


class _Memory(mmap.mmap):
    """A mapping, and the file that it is of."""

    file: OpenFile


def spill(tensors: Sequence[torch.Tensor], folder: str | None = None) -> None:
    """Move the storages of tensors into a file in ``folder``, else in the system's for temporary files.

    ``tensors`` are all that lie in those storages and are to lie there still. Raises ``OSError`` where the file can't
    be made; nothing is moved then.
    """
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
    # The small ones side by side: the system may map much of what lies around a page that is read.
    storages = dict(sorted(storages.items(), key=lambda item: item[1].nbytes()))
    sizes = [_in_pages(storage.nbytes()) for storage in storages.values()]
    offsets = list(accumulate(sizes, initial=0))
    if not offsets[-1]:
        return
    memory = _memory(folder or tempfile.gettempdir(), offsets[-1])
    moved = {}
    for (key, storage), offset in zip(storages.items(), offsets, strict=False):
        if storage.nbytes():
            ctypes.memmove(_address(memory) + offset, storage.data_ptr(), storage.nbytes())
            data = torch.frombuffer(memory, dtype=torch.uint8, count=storage.nbytes(), offset=offset)
            moved[key] = data.untyped_storage()
            memory.flush(offset, _in_pages(storage.nbytes()))
            memory.madvise(mmap.MADV_DONTNEED, offset, _in_pages(storage.nbytes()))
    for tensor in tensors:
        there = moved.get(tensor.untyped_storage()._cdata)
        if there is not None:
            empty = torch.empty(0, dtype=tensor.dtype)
            tensor.data = empty.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())


def _in_pages(size: int) -> int:
    """Bytes of the pages that so many bytes take."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _memory(folder: str, size: int) -> _Memory:
    """A mapped file of that size, of which no name is left."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="fxstream-", dir=folder)
        file = OpenFile(descriptor, path)
        os.unlink(path)
        os.posix_fallocate(descriptor, 0, size)
        memory = _Memory(descriptor, size, mmap.MAP_SHARED)
    except OSError as error:
        raise OSError(error.errno, f"{size} bytes of weights can't be spilled to {folder}: {error.strerror}") from error
    memory.file = file
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
