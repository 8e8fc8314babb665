"""What streaming a pipeline does to its memory: a line a stage."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from fxstream.budget import Resident, format_bytes
from fxstream.notebook import blocks
from fxstream.report import Plan


@dataclass(frozen=True)
class StagePlan:
    """One kind of call of a pipeline's component.

    ``name`` is the component, with the method where it isn't the component itself that is called (``"vae.decode"``).
    ``calls`` is how often one generation calls it so, None where no generation was gone through. ``resident`` is what
    the pipeline holds meanwhile over the inputs, ``budget_bytes`` what it may hold in all (None: no such bound).
    ``plan`` is None where a component that runs whole can't be captured, so that its activations are not known. A
    component with ``streamed`` False runs whole, and ``why`` tells for what reason.
    """

    name: str
    calls: int | None
    plan: Plan | None
    resident: Resident
    budget_bytes: int | None
    streamed: bool = True
    why: str = ""

    @property
    def total_bytes(self) -> int | None:
        """All that is held at the stage's peak: weights, inputs, what the pipeline keeps, activations."""
        if self.plan is None:
            return None
        return self.resident.bytes + self.plan.input_bytes + self.plan.after.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the stage keeps within the budget; None where that is not known, or no bytes were asked for."""
        if self.total_bytes is None or self.budget_bytes is None:
            return None
        return self.total_bytes <= self.budget_bytes


@dataclass(frozen=True, repr=False)
class PipelinePlan:
    """The stages of a pipeline in the order in which a generation comes to them."""

    stages: tuple[StagePlan, ...]

    @property
    def peak_bytes(self) -> int:
        """The most that any stage holds, in bytes."""
        return max((stage.total_bytes or 0 for stage in self.stages), default=0)

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(stage.name for stage in self.stages))
        return f"<PipelinePlan: {format_bytes(self.peak_bytes)} at most, of {names or 'no stage yet'}>"

    def _repr_html_(self) -> str:
        return blocks(self._parts())

    def __str__(self) -> str:
        return "\n\n".join(self._parts())

    def _parts(self) -> list[str]:
        if not self.stages:
            return ["No stage has been planned yet: the first call does that, or height=, width= and the like."]
        parts = [self.table(), f"Weights:\n{self.weights_table()}"]
        whole = dict.fromkeys(f"{stage.name} is not streamed: {stage.why}" for stage in self.stages if stage.why)
        return [*parts, "\n".join(whole)] if whole else parts

    def table(self) -> str:
        """A line a stage. Bytes are weights on the device, inputs, what else is kept, and activations.

        "streamed" tells what runs whole. Where values live on disk, "moved" is what a call reads from there and writes.
        """
        moves = any(stage.plan is not None and stage.plan.moved_bytes for stage in self.stages)
        rows = []
        for stage in self.stages:
            made = stage.plan
            rows.append(
                [
                    stage.name,
                    "" if stage.calls is None else stage.calls,
                    format_bytes(stage.resident.weight_bytes),
                    format_bytes(made.input_bytes) if made else "?",
                    format_bytes(stage.resident.other_bytes),
                    format_bytes(made.before.peak_bytes) if made else "?",
                    format_bytes(made.after.peak_bytes) if made else "?",
                    "?" if stage.total_bytes is None else format_bytes(stage.total_bytes),
                    {True: "yes", False: "no", None: ""}[stage.fits],
                    "yes" if stage.streamed else "no",
                    *([format_bytes(made.moved_bytes) if made else ""] if moves else []),
                ]
            )
        headers = ["stage", "calls", "weights", "inputs", "kept", "before", "after", "all", "fits", "streamed", "moved"]
        align = ("left", *("right",) * 7, "left", "left", "right")
        columns = len(headers) if moves else len(headers) - 1
        return tabulate(rows, headers=headers[:columns], colalign=align[:columns], disable_numparse=True)

    def weights_table(self) -> str:
        """The components whose weights are on the device, and during which stages."""
        names = list(dict.fromkeys(name for stage in self.stages for name in stage.resident.weights))
        rows = []
        for name in names:
            there = [stage for stage in self.stages if name in stage.resident.weights]
            sizes = dict.fromkeys(format_bytes(stage.resident.weights[name]) for stage in there)
            where = "all" if len(there) == len(self.stages) else ", ".join(dict.fromkeys(stage.name for stage in there))
            rows.append([name, " or ".join(sizes), where])
        return tabulate(rows, headers=["component", "bytes", "during"], disable_numparse=True)
