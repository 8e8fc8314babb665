"""A plan as a trace for https://ui.perfetto.dev or chrome://tracing: what runs when, and a counter of live memory.

Times are estimates (see `estimate`), so the trace shows order and share rather than duration.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import fx

from fxstream.tools.estimate import Step, steps

MICROSECOND = 1e-6
SHORTEST = 0.1
"""Microseconds that a view is shown for: it takes none."""

Event = dict[str, Any]


def to_trace(graph_module: fx.GraphModule, name: str) -> str:
    """The Chrome trace of a rewritten graph."""
    events: list[Event] = [{"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"{name}, estimated"}}]
    end = _add(events, steps(graph_module), 0.0)
    events.append(_counter(end, 0))
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _add(events: list[Event], of: Sequence[Step], start: float) -> float:
    """Adds the events of steps that begin at ``start``, in microseconds; returns the time at which they end."""
    for step in of:
        end = start + max(step.seconds / MICROSECOND, SHORTEST)
        if step.slices:
            inside = start
            for number, body in enumerate(step.slices):
                began, inside = inside, _add(events, body, inside)
                events.append(_span(f"{step.name}, slice {number + 1} of {len(step.slices)}", step, began, inside))
            end = max(end, inside)
        else:
            events.append(_counter(start, step.live_bytes))
        events.append(_span(step.name, step, start, end))
        start = end
    return start


def _span(name: str, step: Step, start: float, end: float) -> Event:
    args = {"module": step.module_path, "live_bytes": step.live_bytes}
    return {
        "ph": "X",
        "pid": 1,
        "tid": 1,
        "name": name,
        "ts": round(start, 3),
        "dur": round(end - start, 3),
        "args": args,
    }


def _counter(time: float, live: int) -> Event:
    return {"ph": "C", "pid": 1, "name": "live bytes", "ts": round(time, 3), "args": {"bytes": live}}
