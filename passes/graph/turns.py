"""Turns: one thread at a time captures and plans.

While ``torch.export`` traces it changes torch itself: how modules are called, and which composite operators are taken
apart. A thread that finds another capturing or planning waits its turn. Calls that are planned already don't ask, nor
do models that other threads run as they are: those the tracer is kept away from.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, _ModuleStackTracer

_TURN = threading.RLock()


@contextmanager
def turn() -> Iterator[None]:
    """Capture or plan here, while no other thread does."""
    with _TURN:
        yield


@contextmanager
def tracing_apart() -> Iterator[None]:
    """Let tracers see the modules that this thread calls, and none of what others do, nor tell others that it traces.

    What ``torch.compiler.is_exporting`` says holds for all threads, and functions that ``torch.compiler.disable`` is
    around annotate what is traced meanwhile, in a dictionary that two threads would empty under one another.
    """
    thread = threading.get_ident()

    def here(method: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*arguments: Any) -> Any:
            return (method if threading.get_ident() == thread else elsewhere)(*arguments)

        return chosen

    with ExitStack() as stack:
        for name in ("call_module", "getattr"):
            method = here(getattr(_ModuleStackTracer, name), getattr(PythonKeyTracer, name))
            stack.enter_context(patch.object(_ModuleStackTracer, name, method))
        for name in ("is_compiling", "is_exporting"):
            question = torch.compiler.assume_constant_result(here(getattr(torch.compiler, name), lambda: False))
            stack.enter_context(patch.object(torch.compiler, name, question))
        yield
