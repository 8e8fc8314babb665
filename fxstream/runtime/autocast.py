"""Autocast as a call finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def without_autocast(inputs: Sequence[Any]) -> Iterator[None]:
    """Without autocast on the devices of these inputs: what it does is in a captured graph already."""
    with ExitStack() as stack:
        for device in {x.device.type for x in inputs if isinstance(x, torch.Tensor)} or {"cpu"}:
            if autocast_dtype(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast casts to on a kind of device; None where it is off."""
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None
