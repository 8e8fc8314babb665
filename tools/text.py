"""A plan as text for a terminal."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from fxstream.budget import format_bytes
from fxstream.tools.chart import memory_chart

if TYPE_CHECKING:
    from fxstream.report import Plan

BOLD, GOOD, BAD, PLAIN = "\033[1m", "\033[32m", "\033[31m", "\033[0m"


def report(plan: Plan, budget: str | int | float, measured: str = "") -> str:
    """All that `inspect` prints about a plan; ``measured`` is a table of its own."""
    peak = plan.before.peak_bytes
    parts = [plan.summary(), re.sub("does not fit|fits", _coloured, fits(plan, budget))]
    if measured:
        parts.append(_headed("Predicted and measured:", measured))
    parts.append(_headed("Held at the peak before:", plan.holders_table(plan.before)))
    parts.append(_headed("Held at the peak after:", plan.holders_table(plan.after)))
    parts.append(_headed("Groups:", plan.groups_table()) if plan.groups else "No groups: nothing needs slicing.")
    if plan.barriers:
        parts.append(_headed("Operators without a rule, and the most that is live at one:", plan.barriers_table()))
    else:
        parts.append("Every operator has a rule.")
    if plan.unmeasured:
        parts.append(_headed("Operators whose workspace is not known, and counts as none:", plan.unmeasured_table()))
    for name, profile in (("before", plan.before), ("after", plan.after)):
        title = f"Activations along the schedule {name}, at most {format_bytes(profile.peak_bytes)}:"
        parts.append(_headed(title, memory_chart(profile.live_bytes, top_bytes=peak)))
    parts.append(f"Planned for {plan.machine}.")
    parts.append(f"Capture {plan.seconds['capture']:.1f} s, planning {plan.seconds['planning']:.1f} s.")
    return "\n\n".join(parts)


def fits(plan: Plan, budget: str | int | float) -> str:
    """Whether the call is within the budget as captured, and as streamed."""
    before, after = plan.before.peak_bytes, plan.after.peak_bytes
    if plan.budget_bytes is None:
        return f"Lowest reachable: {after / max(before, 1):.1%} of the activation peak."
    answers = ["fits" if peak <= plan.budget_bytes else "does not fit" for peak in (before, after)]
    left = format_bytes(plan.budget_bytes)
    return f"Budget {budget}, which leaves {left} to activations: before {answers[0]}, after {answers[1]}."


def styled(text: str, style: str) -> str:
    """Text in a terminal's style: only where it goes to one, and https://no-color.org is not asked for."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return text if plain else f"{style}{text}{PLAIN}"


def _coloured(answer: re.Match[str]) -> str:
    return styled(answer[0], BAD if "not" in answer[0] else GOOD)


def _headed(title: str, table: str) -> str:
    return f"{styled(title, BOLD)}\n{table}"
