"""fxstream makes video diffusion models fit a memory budget, without changing their output."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxstream.api import optimize, plan, restore
    from fxstream.errors import (
        CaptureError,
        DeviceMemoryError,
        FxstreamError,
        GradientError,
        InternalError,
        MemoryBudgetError,
    )
    from fxstream.fake import fake_on
    from fxstream.module import StreamedModule
    from fxstream.pipeline.plan import PipelinePlan
    from fxstream.rehash.calibrate import calibrate
    from fxstream.rehash.calibration import Calibration
    from fxstream.rehash.rehash import RehashedModule, RehashStats
    from fxstream.rehash.settings import StepRehash
    from fxstream.report import Plan

__all__ = [
    "Calibration",
    "CaptureError",
    "DeviceMemoryError",
    "FxstreamError",
    "GradientError",
    "InternalError",
    "MemoryBudgetError",
    "PipelinePlan",
    "Plan",
    "RehashStats",
    "RehashedModule",
    "StepRehash",
    "StreamedModule",
    "calibrate",
    "fake_on",
    "optimize",
    "plan",
    "restore",
]

_HOME = {
    "Calibration": "rehash.calibration",
    "CaptureError": "errors",
    "DeviceMemoryError": "errors",
    "FxstreamError": "errors",
    "GradientError": "errors",
    "InternalError": "errors",
    "MemoryBudgetError": "errors",
    "PipelinePlan": "pipeline.plan",
    "Plan": "report",
    "RehashStats": "rehash.rehash",
    "RehashedModule": "rehash.rehash",
    "StepRehash": "rehash.settings",
    "StreamedModule": "module",
    "calibrate": "rehash.calibrate",
    "fake_on": "fake",
    "optimize": "api",
    "plan": "api",
    "restore": "api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line's help needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
