"""fxstream makes video diffusion models fit a memory budget, without changing their output."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxstream.api import optimize, plan, restore
    from fxstream.calibration import Calibration, calibrate
    from fxstream.errors import CaptureError, FxstreamError, GradientError, MemoryBudgetError
    from fxstream.module import StreamedModule
    from fxstream.pipeline_plan import PipelinePlan
    from fxstream.rehash import RehashedModule, RehashStats, StepRehash
    from fxstream.report import Plan

__all__ = [
    "Calibration",
    "CaptureError",
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
    "optimize",
    "plan",
    "restore",
]

_HOME = {
    "Calibration": "calibration",
    "CaptureError": "errors",
    "FxstreamError": "errors",
    "GradientError": "errors",
    "InternalError": "errors",
    "MemoryBudgetError": "errors",
    "PipelinePlan": "pipeline_plan",
    "Plan": "report",
    "RehashStats": "rehash",
    "RehashedModule": "rehash",
    "StepRehash": "rehash",
    "StreamedModule": "module",
    "calibrate": "calibration",
    "optimize": "api",
    "plan": "api",
    "restore": "api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line's help needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
