"""Lookups: a few rows of a table read from the file that it lives in, where most of it is never looked at.

This file imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxstream.runtime.fetch import read
from fxstream.runtime.files import region_of


@torch.library.custom_op("fxstream::lookup", mutates_args=())
def lookup(home: Tensor, indices: Tensor) -> Tensor:
    """Rows of a contiguous table (N, D) at indices of any shape (*S): (*S, D), as ``torch.embedding``.

    Raises ``IndexError`` where one is none of a row, and ``OSError`` where the file can't be read.
    """
    region, width = region_of(home), home.shape[1] * home.element_size()
    if region is None or region.is_changed(home.data_ptr(), home.shape[0] * width):
        return torch.embedding(home, indices)
    rows = _rows_like(home, indices)
    for number, row in enumerate(indices.flatten().tolist()):
        if not 0 <= row < home.shape[0]:
            raise IndexError(f"index {row} is out of range of a table of {home.shape[0]} rows")
        read(region, region.offset_of(home.data_ptr()) + row * width, rows.data_ptr() + number * width, width)
    return rows


@lookup.register_fake
def _rows_like(home: Tensor, indices: Tensor) -> Tensor:
    return home.new_empty((*indices.shape, home.shape[1]))


LOOKUP = torch.ops.fxstream.lookup.default
