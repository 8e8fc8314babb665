"""The command line. `fxstream inspect TARGET` says what streaming a model would do to its memory, and runs nothing."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, NoReturn

from fxstream.budget import Budget, format_bytes
from fxstream.tools.chart import memory_chart

if TYPE_CHECKING:
    from fxstream.report import Plan

# Help and errors of usage come at once: what needs torch is imported by the command that runs, so the names of the
# catalogue stand here once more.
TARGETS = ("svd-unet", "svd-xt-unet", "animatediff-unet", "modelscope-unet", "i2vgenxl-unet")
DTYPES = ("float16", "bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for input that can't be used."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the chart's characters
    try:
        code = inspect(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def inspect(args: argparse.Namespace) -> int:
    """Plans one model of the catalogue and prints the plan."""
    import torch

    from fxstream import CaptureError, MemoryBudgetError
    from fxstream import plan as make_plan
    from fxstream.tools.catalogue import CATALOGUE, build

    given = {name: getattr(args, name) for name in ("frames", "height", "width", "batch")}
    shape = replace(CATALOGUE[args.target].shape, **{name: value for name, value in given.items() if value is not None})
    with _progress(f"building {args.target}", args.quiet):
        model, inputs, keywords = build(args.target, **asdict(shape), dtype=getattr(torch, args.dtype))
    try:
        with _progress("capturing and planning", args.quiet):
            plan = make_plan(model, inputs, keywords, memory_budget=args.budget)
    except MemoryBudgetError as error:
        what = "activations" if isinstance(args.budget, float) else "weights, inputs and activations"
        lowest = f"{format_bytes(error.lowest_bytes)} of {what}"
        return _failed(f"a budget of {args.budget} can't be met: the lowest reachable is {lowest}; try --budget min")
    except CaptureError as error:
        return _failed(" ".join(str(error).split()))
    size = f"batch {shape.batch}, {shape.frames} frames of {shape.height} x {shape.width}"
    print(f"{args.target}: {size}, {args.dtype}\n")
    print(report(plan, args.budget))
    return 0


def report(plan: Plan, budget: str | int | float) -> str:
    """All that `inspect` prints about a plan."""
    peak = plan.before.peak_bytes
    parts = [plan.summary(), _fits(plan, budget)]
    parts.append("Held at the peak before:\n" + plan.holders_table(plan.before))
    parts.append("Held at the peak after:\n" + plan.holders_table(plan.after))
    parts.append("Groups:\n" + plan.groups_table() if plan.groups else "No groups: nothing needs slicing.")
    if plan.barriers:
        parts.append("Operators without a rule, and the most that is live at one:\n" + plan.barriers_table())
    else:
        parts.append("Every operator has a rule.")
    for name, profile in (("before", plan.before), ("after", plan.after)):
        title = f"Activations along the schedule {name}, at most {format_bytes(profile.peak_bytes)}:"
        parts.append(f"{title}\n{memory_chart(profile.live_bytes, top_bytes=peak)}")
    parts.append(f"Capture {plan.seconds['capture']:.1f} s, planning {plan.seconds['planning']:.1f} s.")
    return "\n\n".join(parts)


def _fits(plan: Plan, budget: str | int | float) -> str:
    before, after = plan.before.peak_bytes, plan.after.peak_bytes
    if plan.budget_bytes is None:
        return f"Lowest reachable: {after / max(before, 1):.1%} of the activation peak."
    answers = ["fits" if peak <= plan.budget_bytes else "does not fit" for peak in (before, after)]
    left = format_bytes(plan.budget_bytes)
    return f"Budget {budget}, which leaves {left} to activations: before {answers[0]}, after {answers[1]}."


@contextmanager
def _progress(what: str, quiet: bool) -> Iterator[None]:
    """Says on stderr what is going on, then how long it took."""
    if quiet:
        yield
        return
    began = time.perf_counter()
    print(what, end=" ... ", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)


def _failed(message: str) -> int:
    print(f"fxstream: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fxstream", description="Make video diffusion models fit a memory budget, exactly.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="what streaming a model would do to its memory",
        description="Say where a model's memory peaks and what streaming would make of it. The model stands at its "
        "published size without weights, so nothing is downloaded, allocated or run.",
    )
    command.add_argument("target", metavar="TARGET", choices=TARGETS, help="one of " + ", ".join(TARGETS))
    command.add_argument("--frames", type=_count, help="frames of the video (default: as published)")
    command.add_argument("--height", type=_pixels, help="pixels (default: as published)")
    command.add_argument("--width", type=_pixels, help="pixels (default: as published)")
    command.add_argument("--batch", type=_count, help="videos in a call (default: 2, for classifier-free guidance)")
    command.add_argument(
        "--dtype", metavar="DTYPE", choices=DTYPES, default="float16", help=", ".join(DTYPES) + " (default: float16)"
    )
    command.add_argument(
        "--budget",
        type=_budget,
        default="min",
        help='"6GiB", "800MB" or bytes, for weights, inputs and activations; a share of the activation peak such as '
        '0.5; or "min", the lowest reachable (default: min)',
    )
    command.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _pixels(text: str) -> int:
    if _count(text) % 8:
        raise argparse.ArgumentTypeError(f"{text} pixels are not a multiple of 8, the step of a latent")
    return int(text)


def _budget(text: str) -> str | int | float:
    """A budget as `fxstream.optimize` takes it: what reads as a number is one."""
    budget: str | int | float = text
    for kind in (float, int):
        try:
            budget = kind(text)
        except ValueError:
            continue
    try:
        Budget.parse(budget)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None
    return budget


if __name__ == "__main__":
    sys.exit(main())
