"""`fxstream inspect`: where a model's memory peaks, and what streaming would make of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fxstream import CaptureError, MemoryBudgetError
from fxstream.budget import Budget, format_bytes
from fxstream.disk import Disk
from fxstream.passes.graph.call import Inputs
from fxstream.planned import Compiled, compile_call
from fxstream.tools import document, dot, html, listing, picture, text, trace
from fxstream.tools.bench import relative_l2
from fxstream.tools.document import Document
from fxstream.tools.errors import UsageError, one_line
from fxstream.tools.files import STDOUT, check_writable, named, write
from fxstream.tools.measure import measure_peak
from fxstream.tools.progress import progress
from fxstream.tools.targets import Size, Target, is_function, load

Content = str | bytes


@dataclass(frozen=True)
class Inspected:
    """A target, its plan, and the document of both."""

    target: Target
    compiled: Compiled
    found: Document


FORMS: dict[str, Callable[[Inspected], Content]] = {
    "json": lambda inspected: document.to_json(inspected.found),
    "csv": lambda inspected: document.to_csv(inspected.found),
    "html": lambda inspected: html.to_html(inspected.found),
    "png": lambda inspected: picture.timeline(inspected.found, "png"),
    "svg": lambda inspected: picture.timeline(inspected.found, "svg"),
    "trace": lambda inspected: trace.to_trace(inspected.compiled.graph_module, inspected.target.name),
    "dot": lambda inspected: dot.to_dot(inspected.compiled),
    "code": lambda inspected: listing.listing(inspected.compiled.graph_module),
}
"""Option -> what makes that form of output."""


def run(args: argparse.Namespace) -> int:
    """The command."""
    paths = {f"--{form}": getattr(args, form) for form in FORMS}
    check_writable(paths)
    if args.png or args.svg:
        picture.check_available()
    inspected = inspect(args.target, args)
    for form, make in FORMS.items():
        path = getattr(args, form)
        if path is not None:
            write(named(path, inspected.target.name), make(inspected), args.quiet)
    if STDOUT not in paths.values():
        print(heading(inspected.found))
        print(text.report(inspected.compiled.plan, args.budget, _measured_table(inspected.found)))
    return 0


def inspect(name: str, args: argparse.Namespace) -> Inspected:
    """Builds, captures, plans and, where it was asked for, runs a target."""
    device = args.device
    if device is None and args.offload and not is_function(name):
        device = "cpu"  # where alone values may be on disk
    size = Size(args.frames, args.height, args.width, args.batch, args.dtype, device)
    with progress(f"building {name}", args.quiet):
        target = load(name, size, component=args.component, small=args.small, fake=not args.measure)
    with progress("capturing and planning", args.quiet):
        compiled = planned(target, args.budget, args.offload)
    about: dict[str, Any] = {
        "target": target.name,
        "model": target.kind,
        "inputs": target.inputs(),
        "device": target.device,
        "budget": args.budget,
        "fits": text.fits(compiled.plan, args.budget),
        "measured": None,
    }
    if args.measure:
        with progress("running it eagerly, as captured and streamed", args.quiet):
            about["measured"] = measure(target, compiled)
    return Inspected(target, compiled, document.document(compiled.plan, compiled.graph_module, about))


def planned(target: Target, budget: str | int | float, offload: str | None = None) -> Compiled:
    """The plan of a target. Raises ``UsageError`` where there is none."""
    try:
        return compile_call(target.call, target.args, target.kwargs, Budget.parse(budget), disk=Disk.parse(offload))
    except MemoryBudgetError as error:
        what = "weights, inputs and activations"
        if isinstance(budget, float):
            what = "activations" if offload is None else "weights and activations"
        lowest = f"{format_bytes(error.lowest_bytes)} of {what}"
        raise UsageError(
            f"a budget of {budget} can't be met: the lowest reachable is {lowest}; try --budget min"
        ) from error
    except (CaptureError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def heading(found: Document) -> str:
    """What was inspected."""
    return f"{found['target']}: {found['model']}, {', '.join(found['inputs'])}\n"


def measure(target: Target, compiled: Compiled) -> list[dict[str, Any]]:
    """Runs a target eagerly, as captured, and streamed: peaks predicted and measured, and the distance to eager."""
    check_real(target)
    tensors = Inputs.of(target.args, target.kwargs).tensors
    plan, captured = compiled.plan, compiled.captured
    runs = [
        ("eager", None, lambda: target.call(*target.args, **target.kwargs)),
        ("captured", plan.before.peak_bytes, lambda: captured.result(captured.graph_module(*tensors))),
        ("streamed", plan.after.peak_bytes, lambda: captured.result(compiled.graph_module(*tensors))),
    ]
    rows, reference = [], None
    with torch.no_grad():
        for name, predicted, call in runs:
            try:
                measured = measure_peak(call)
            except (RuntimeError, MemoryError) as error:
                raise UsageError(f"{target.name} can't be run ({one_line(error)}); try a smaller size") from error
            result = next(leaf for leaf in tree_leaves(measured.result) if isinstance(leaf, torch.Tensor))
            reference = result if reference is None else reference
            rows.append(
                {
                    "run": name,
                    "predicted_bytes": predicted,
                    "measured_bytes": measured.peak_bytes,
                    "relative_l2": relative_l2(result, reference),
                }
            )
    return rows


def check_real(target: Target) -> None:
    """Raises ``UsageError`` for a target that can be planned but not run."""
    tensors = [*Inputs.of(target.args, target.kwargs).tensors, *target.model.parameters()]
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors):
        raise UsageError(
            f"{target.name} has tensors without memory, so it can't be run; leave --measure, or make real ones"
        )


def _measured_table(found: Document) -> str:
    rows = [
        [
            row["run"],
            "" if row["predicted_bytes"] is None else format_bytes(row["predicted_bytes"]),
            format_bytes(row["measured_bytes"]),
            f"{row['relative_l2']:.1e}",
        ]
        for row in found["measured"] or ()
    ]
    headers = ["", "predicted peak", "measured peak", "relative L2 to eager"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 3)) if rows else ""
