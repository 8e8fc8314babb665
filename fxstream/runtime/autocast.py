"""Autocast as a call finds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_KNOWN = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu", torch._C._get_privateuse1_backend_name())
_CASTING = [device for device in _KNOWN if torch.amp.is_autocast_available(device)]


@contextmanager
def without_autocast() -> Iterator[None]:
    """Without autocast on any type of device: what it does is in a captured graph already."""
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def autocast_devices() -> list[str]:
    """The types of device for which autocast is on."""
    return [device for device in _CASTING if torch.is_autocast_enabled(device)]
