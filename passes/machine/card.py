"""Cards: what a process holds of a CUDA card beside what torch's allocator reserves, and what there is to hold."""

from __future__ import annotations

import torch

CONTEXT = 512 << 20
"""Bytes of a CUDA context with the kernels that it loads: an estimate, of 300 to 600 MiB."""

LIBRARIES = 33 << 20
"""Bytes that cuBLAS keeps of a card: 32 MiB where the capability is 9.0, else 8, and 1 for its light variant."""

OVERHEAD = CONTEXT + LIBRARIES

MARGIN = 0.02
"""The share of a card that is left alone where its free memory is the budget: other programs' memory moves, too."""


def free_bytes() -> int:
    """What this process may hold of the current card, by what is free there now. Raises ``ValueError`` without one."""
    if not torch.cuda.is_available():
        raise ValueError('memory_budget="device" is what is free of a CUDA card, and there is none: give bytes')
    free, total = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() + CONTEXT - MARGIN * total)
