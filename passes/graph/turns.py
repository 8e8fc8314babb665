"""Turns: one thread at a time captures and plans.

While ``torch.export`` traces it changes torch itself: how modules are called, and which composite operators are taken
apart. A thread that finds another capturing or planning waits its turn. Calls that are planned already don't ask, nor
do models that other threads run as they are: those the tracer is kept away from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.fx.experimental.proxy_tensor import PythonKeyTracer, _ModuleStackTracer

_TURN = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """Capture or plan here, while no other thread does."""
    with _TURN:
        yield


@contextmanager
def tracing_apart() -> Iterator[None]:
    """Let tracers see the modules that this thread calls, and none of what others do."""
    thread, traced = threading.get_ident(), (_ModuleStackTracer.call_module, _ModuleStackTracer.getattr)
    plain = PythonKeyTracer.call_module, PythonKeyTracer.getattr

    def call_module(tracer: Any, *arguments: Any) -> Any:
        return (traced if threading.get_ident() == thread else plain)[0](tracer, *arguments)

    def getattr(tracer: Any, *arguments: Any) -> Any:
        return (traced if threading.get_ident() == thread else plain)[1](tracer, *arguments)

    with ExitStack() as stack:
        for method in (call_module, getattr):
            stack.enter_context(patch.object(_ModuleStackTracer, method.__name__, method))
        yield
