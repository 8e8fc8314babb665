"""Errors that fxstream raises. Nothing of the user's is changed when one is raised."""

from __future__ import annotations

from typing import Any


class FxstreamError(Exception):
    """Base of all errors raised by fxstream."""


class CaptureError(FxstreamError):
    """The model could not be captured as one graph.

    ``module_path`` is the path of the user's submodule that was running, ``source`` its file and line. It is
    ``data_dependent`` where a branch, a number or a size depends on tensors' values.
    """

    def __init__(self, message: str, *, module_path: str = "", source: str = "", data_dependent: bool = False) -> None:
        super().__init__(message)
        self.data_dependent = data_dependent
        self.module_path = module_path
        self.source = source


class MemoryBudgetError(FxstreamError):
    """No plan within the budget was found.

    ``lowest_bytes`` is the lowest budget that was reached, by the same account as ``budget_bytes``;
    ``holders`` are the tensors that hold the peak there; ``plan`` is the plan that reaches it. Of a pipeline these are
    those of the stage that needs most, which ``stage`` names (``"vae.decode"``; "" for a module by itself).
    """

    def __init__(
        self, message: str, *, budget_bytes: int, lowest_bytes: int, holders: Any, plan: Any, stage: str = ""
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.budget_bytes = budget_bytes
        self.lowest_bytes = lowest_bytes
        self.holders = holders
        self.plan = plan


class DeviceMemoryError(FxstreamError):
    """A streamed call ran out of the device's memory, though its plan is within the budget.

    ``plan`` is that plan. ``allocated_bytes`` and ``reserved_bytes`` are what torch's allocator had in use and had
    taken of the card when the error was raised, ``free_bytes`` what nobody had.
    """

    def __init__(self, message: str, *, plan: Any, allocated_bytes: int, reserved_bytes: int, free_bytes: int) -> None:
        super().__init__(message)
        self.plan = plan
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.free_bytes = free_bytes


class GradientError(FxstreamError):
    """A streamed module was called where autograd would record; it runs inference only."""


class InternalError(FxstreamError):
    """fxstream itself failed where it should have made a plan: a fault of its own, not of the model.

    ``path`` is the file that the graph was saved to, "" where it could not be.
    """

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path
