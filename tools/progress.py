"""Progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[None]:
    """Says what is going on, then how long it took."""
    if quiet:
        yield
        return
    began = time.perf_counter()
    print(what, end=" ... ", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
