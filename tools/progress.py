"""Progress on standard error, where that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

ERASE = "\r\033[K"


@contextmanager
def progress(what: str, quiet: bool) -> Iterator[None]:
    """Says what is going on, then how long it took; nothing of what failed, which the error tells."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    began = time.perf_counter()
    print(what, end=" ... ", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print(ERASE, end="", file=sys.stderr, flush=True)
        raise
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
