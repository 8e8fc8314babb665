"""What a rewritten graph draws random numbers from that is given at each call: the call's own generators."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_CALLS = threading.local()


@contextmanager
def generators_given(generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Run a graph for a call that has these generators."""
    before = getattr(_CALLS, "generators", ())
    _CALLS.generators = generators
    try:
        yield
    finally:
        _CALLS.generators = before


def given_generator(place: int) -> torch.Generator:
    """The generator at that place among those of this thread's call."""
    generator: torch.Generator = _CALLS.generators[place]
    return generator
