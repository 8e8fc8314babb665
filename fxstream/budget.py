"""Memory budgets as a user writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Rational, Real

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}B"] = 1000**_power
    _UNITS[f"{_prefix}IB"] = 1024**_power

_FORMS = (
    'use "6GiB" or an int of bytes (weights, inputs and activations), a float in (0, 1), "min", or "device" for what '
    "is free of a CUDA card"
)


@dataclass(frozen=True)
class Budget:
    """A parsed budget: one of ``total_bytes`` (all that a call holds), ``share`` (of the captured graph's activation
    peak), or neither: the lowest reachable."""

    total_bytes: int | None = None
    share: float | None = None

    @staticmethod
    def parse(budget: str | int | float) -> Budget:
        """``"6GiB"``, ``"800MB"``, an int of bytes, a float in (0, 1), ``"min"`` or ``"device"``; numpy's numbers, too.

        Raises ``ValueError`` for anything else, and for ``"device"`` where there is no card.
        """
        if isinstance(budget, Rational):
            fits = isinstance(budget, Integral) and not isinstance(budget, bool)
        else:
            fits = isinstance(budget, (str, Real))
        if not fits:
            raise ValueError(f"memory_budget {budget!r} can't be read: {_FORMS}")
        if isinstance(budget, Integral):
            budget = int(budget)
        elif not isinstance(budget, str):
            if not 0 < budget < 1:
                raise ValueError(f"memory_budget {budget!r} is no share between 0 and 1: {_FORMS}")
            return Budget(share=float(budget))
        word = budget.strip().lower() if isinstance(budget, str) else ""
        if word == "min":
            return Budget()
        if word == "device":
            from fxstream.passes.machine.card import free_bytes  # and with it torch

            return Budget(total_bytes=free_bytes())
        size = _bytes(budget) if isinstance(budget, str) else budget
        if size <= 0:
            raise ValueError(f"memory_budget {budget!r} is not more than nothing: {_FORMS}")
        return Budget(total_bytes=size)

    def activation_bytes(self, peak_bytes: int, held_bytes: int, kept_bytes: int = 0) -> int | None:
        """What is left for activations, in bytes; None where the lowest is asked for.

        ``peak_bytes`` is the captured graph's activation peak, ``held_bytes`` its weights and inputs,
        ``kept_bytes`` activations of other calls, which a share is of, too.
        """
        if self.share is not None:
            return int(self.share * peak_bytes) - kept_bytes
        return None if self.total_bytes is None else self.total_bytes - held_bytes - kept_bytes


@dataclass(frozen=True)
class Resident:
    """What the device holds while a call runs, over its inputs and activations.

    ``weights`` maps each component of a pipeline to the bytes of its weights; ``other_bytes`` are those of tensors that
    the pipeline keeps for later. ``stage`` is what errors call the call.
    """

    stage: str
    weights: Mapping[str, int]
    other_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.other_bytes


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"memory_budget {text!r} can't be read: {_FORMS}")
    return int(Fraction(match[1]) * unit)


def format_bytes(size: float) -> str:
    """Bytes for people: ``"3.27 GiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
