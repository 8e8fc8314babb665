"""Absent devices: fake tensors on a device that this machine, or this torch, does not have.

A torch that was built for a kind of device makes fake tensors on it with no device there. Others lack the device's
guard, which says which device is the current one, and stop the process; they are given the guard of "meta", which does
nothing, as builds for CUDA give themselves one where there is no driver. Real tensors are as impossible as before.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch._C import _autograd

GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
"""`c10::impl::device_guard_impl_registry`: a pointer for each kind of device."""


def numbered(device: torch.device) -> torch.device:
    """The device with its number, which nothing but a guard would know of one that isn't there."""
    return torch.device(device.type, 0) if device.index is None and device.type not in ("cpu", "meta") else device


def let_be_guarded(kind: str) -> None:
    """Give a kind of device the guard that does nothing, if it has none."""
    try:
        registry = (ctypes.c_void_p * 64).in_dll(ctypes.CDLL(str(_library())), GUARDS)
    except (OSError, ValueError):  # a torch that is laid out otherwise; it says itself what it lacks
        return
    numbers = {name.lower(): value.value for name, value in _autograd.DeviceType.__members__.items()}
    if registry[numbers.get(kind, numbers["meta"])] is None:
        registry[numbers[kind]] = registry[numbers["meta"]]


def _library() -> Path:
    """torch's library of devices."""
    folder = Path(torch.__file__).parent / "lib"
    return next((path for path in sorted(folder.glob("*c10.*"))), folder / "libc10.so")
