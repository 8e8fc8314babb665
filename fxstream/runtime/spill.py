"""Spilling: tensors in a file that they are mapped from, moved there or made there, so that they hold no memory.

The file has no name: it is gone with the last tensor in it, or with the process. What is written to a spilled tensor
is written to the file. This file imports torch alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, product
from weakref import WeakValueDictionary, finalize

import torch

from fxstream.runtime.files import MOST_AT_ONCE, OpenFile


class _Memory(mmap.mmap):
    """A mapping, and the file that it is of."""

    file: OpenFile


_SPILLED: WeakValueDictionary[int, _Memory] = WeakValueDictionary()
"""Mappings by their addresses."""


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


def empty_at_home(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, folder: str | None = None
) -> torch.Tensor:
    """A tensor in a file in ``folder``, else in the system's for temporary files; as ``torch.empty_strided``.

    Raises ``OSError`` where the file can't be made.
    """
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return _in(_free_memory(folder, (last + 1) * dtype.itemsize), shape, stride, dtype)


def send_home(tensor: torch.Tensor, folder: str) -> torch.Tensor:
    """A copy of a tensor and of all of its storage in a file. Raises ``OSError`` as ``empty_at_home`` does."""
    size = tensor.untyped_storage().nbytes()
    memory = _free_memory(folder, size)
    _write(memory, 0, tensor.untyped_storage().data_ptr(), size)
    return _in(memory, tensor.shape, tensor.stride(), tensor.dtype, int(tensor.storage_offset()))


def write_home(window: torch.Tensor, part: torch.Tensor) -> bool:
    """Write a part to a window of a spilled tensor, by way of its file: written to, its pages would be in memory.

    The system maps much around a page that is written to. False, and nothing written, where the two lie together in
    stretches of less than a page.
    """
    memory = _SPILLED.get(window.untyped_storage().data_ptr())
    order = sorted(range(window.dim()), key=window.stride, reverse=True)
    window, part = window.permute(order), part.permute(order)
    stretch, outer = 1, window.dim()
    while outer and (window.shape[outer - 1] == 1 or window.stride(outer - 1) == part.stride(outer - 1) == stretch):
        outer -= 1
        stretch *= window.shape[outer]
    size, item = stretch * window.element_size(), window.element_size()
    if memory is None or size < mmap.PAGESIZE or part.dtype != window.dtype:
        return False
    for index in product(*map(range, window.shape[:outer])):
        there = sum((at * step for at, step in zip(index, window.stride(), strict=False)), int(window.storage_offset()))
        here = sum(at * step for at, step in zip(index, part.stride(), strict=False))
        _write(memory, there * item, part.data_ptr() + here * item, size)
    return True


def _write(memory: _Memory, offset: int, address: int, size: int) -> None:
    """Write bytes from an address to the file of mapped memory: by way of the mapping, its pages would be in memory.

    The system may write less than it is asked to.
    """
    done = 0
    while done < size:
        part = (ctypes.c_char * min(size - done, MOST_AT_ONCE)).from_address(address + done)
        done += os.pwrite(memory.file.descriptor, part, offset + done)


@contextmanager
def files_reused() -> Iterator[None]:
    """Within it, files of tensors that are gone serve others of this thread: a new one's pages are dear.

    Those that are left at its end are closed.
    """
    before = _free()
    _FREE.memories = []
    try:
        yield
    finally:
        _FREE.memories = before


_FREE = threading.local()

MOST_TOO_LARGE = 2
"""A file serves for a tensor again that is no more than so many times as large."""


def _free() -> list[_Memory] | None:
    """The memory that may serve again in this thread, if any may."""
    return getattr(_FREE, "memories", None)


def _free_memory(folder: str | None, size: int) -> _Memory:
    free = _free() or []
    fitting = [memory for memory in free if size <= len(memory) <= MOST_TOO_LARGE * size]
    if not fitting:
        return _memory(folder or tempfile.gettempdir(), size)
    best = min(fitting, key=len)
    free.remove(best)
    return best


def _in(
    memory: _Memory, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> torch.Tensor:
    """A tensor in mapped memory, which is free again when the tensor's storage is gone."""
    buffer, free = (ctypes.c_char * len(memory)).from_buffer(memory), _free()
    if free is not None:
        finalize(buffer, free.append, memory).atexit = False
    data = torch.frombuffer(buffer, dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(data.untyped_storage(), offset, shape, stride)


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
        memory.madvise(mmap.MADV_NOHUGEPAGE)  # a page that is read would bring 2 MiB in
    except OSError as error:
        raise OSError(error.errno, f"{size} bytes can't be spilled to {folder}: {error.strerror}") from error
    memory.file = file
    _SPILLED[_address(memory)] = memory
    return memory


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
