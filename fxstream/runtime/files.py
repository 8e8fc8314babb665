"""Files that tensors lie in: which bytes of which file a mapped tensor is, as the system tells (Linux alone does).

A tensor is mapped where ``from_pretrained`` reads safetensors, where ``torch.load(mmap=True)`` does, and where it was
spilled. This file imports torch alone.
"""

from __future__ import annotations

import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from mmap import PAGESIZE
from weakref import WeakValueDictionary, finalize

import torch
from torch.utils.weak import WeakIdKeyDictionary

MOST_AT_ONCE = 1 << 30
"""Bytes that one system call is asked for: Linux reads and writes at most 2 GiB."""


class OpenFile:
    """A file, open for as long as this is held."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor, self.path = descriptor, path
        finalize(self, os.close, descriptor)
        found = os.fstat(descriptor)
        self.identity = found.st_dev, found.st_ino
        _OPEN[self.identity] = self


_OPEN: WeakValueDictionary[tuple[int, int], OpenFile] = WeakValueDictionary()


@dataclass(frozen=True)
class Region:
    """Addresses [``start``, ``end``) of this process, mapped from ``offset`` on of a file.

    What is written to ``private`` memory is not in the file.
    """

    start: int
    end: int
    offset: int
    file: OpenFile
    private: bool

    def offset_of(self, address: int) -> int:
        """Where in the file an address of the region lies."""
        return self.offset + address - self.start

    def is_changed(self, address: int, size: int) -> bool:
        """Whether memory may hold something else than the file does."""
        if not self.private or not size:
            return False
        first, last = address // PAGESIZE, (address + size - 1) // PAGESIZE
        try:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                entries = os.pread(pagemap.fileno(), 8 * (last - first + 1), 8 * first)
        except OSError:
            return True
        pages = torch.frombuffer(bytearray(entries), dtype=torch.int64)
        taken = (pages < 0) | ((pages >> 62) & 1).bool()  # in memory, or swapped out
        of_file = ((pages >> 61) & 1).bool()
        return len(pages) <= last - first or bool((taken & ~of_file).any())


@dataclass(frozen=True)
class _Known:
    """Where a tensor was found. Its storage is held, so that no other comes to lie at the address meanwhile."""

    address: int
    storage: torch.UntypedStorage
    region: Region | None


_TENSORS = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def region_of(tensor: torch.Tensor) -> Region | None:
    """The mapped region that all bytes of a dense tensor lie in, if there is one."""
    known = _TENSORS.get(tensor)
    if known is None or known.address != tensor.data_ptr():
        locate([tensor])
        known = _TENSORS[tensor]
    region: Region | None = known.region
    return region


def locate(tensors: Iterable[torch.Tensor]) -> None:
    """Find the regions of tensors, all at once."""
    with _LOCK:
        mappings = _mappings()
        starts = [mapping.start for mapping in mappings]
        for tensor in tensors:
            start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
            place = bisect_right(starts, start) - 1
            found = mappings[place] if place >= 0 and start + size <= mappings[place].end else None
            _TENSORS[tensor] = _Known(start, tensor.untyped_storage(), None if found is None else found.region())


@dataclass(frozen=True)
class _Mapping:
    """A mapped file as the system lists it."""

    start: int
    end: int
    private: bool
    offset: int
    identity: tuple[int, int]
    path: str

    def region(self) -> Region | None:
        """The same with the file open; None where that is not to be had any more under its name."""
        file = _OPEN.get(self.identity)
        if file is None:
            try:
                file = OpenFile(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), self.path)
            except OSError:
                return None
        return Region(self.start, self.end, self.offset, file, self.private) if file.identity == self.identity else None


_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{3}([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)\s+(/.*)")


def _mappings() -> list[_Mapping]:
    """The mapped files of this process, by their addresses."""
    try:
        with open("/proc/self/maps") as maps:
            lines = [match.groups() for line in maps if (match := _LINE.match(line)) is not None]
    except OSError:
        return []
    found = []
    for start, end, kind, offset, major, minor, inode, path in lines:
        identity = os.makedev(int(major, 16), int(minor, 16)), int(inode)
        found.append(_Mapping(int(start, 16), int(end, 16), kind == "p", int(offset, 16), identity, path))
    return found
