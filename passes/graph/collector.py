"""Collector: Python's search for unreachable cycles, put off while a graph is captured or planned.

Both make hundreds of thousands of small objects that live on; looking through them again and again took a fifth of the
time. What is let go in cycles meanwhile holds no tensor's memory.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of cycles inside; after it as before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
