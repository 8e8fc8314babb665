"""A fuzzer of the whole: random programs, optimized for random budgets, held to what their models do.

Program ``i`` is drawn from the seed ``SEED + i`` alone, so ``--seed S --count 1`` shows one again. Each is called
twice, with random numbers and state as the model's own, and then measured. Faults are

    wrong      a result, an input or a buffer is not what the model makes of it (relative L2 above 1e-6, in float32), or
               is laid out in another way
    crash      an error that is no CaptureError, in planning or in the call, where the model itself runs
    above      a plan holds more than the captured graph, or than the budget that it was made for
    peak       the allocator's peak is not the planned one, within 1 per cent or 8 KiB
    refused    a CaptureError: counted, and for a person to judge

A program with a fault is made smaller as long as the fault stays the same, and printed as a script.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxstream
from fxstream.tools.bench import relative_l2
from fxstream.tools.fuzz_programs import Line, Program, draw_program
from fxstream.tools.measure import measure_peak

NEAR = 1e-6
"""Relative L2 between the results of a program and of its model, in float32."""

NEAR_DOUBLE = 1e-11
"""In float64, where a fault is no smaller and rounding is: what is this near there was rounding."""

MOST_ROUNDING = 1e-3
"""What is further off in float32 is not taken for rounding."""

SHARE, LEAST = 0.01, 8192
"""A measured peak is within this share of the planned one, or within so many bytes."""

CALLS = 2

BREAKING = ("wrong", "crash", "above")
"""Faults that break a promise."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a program, of a kind and in words; ``budget`` is what it was planned for."""

    kind: str
    what: str
    budget: Any = None

    @property
    def sort(self) -> tuple[str, str]:
        """Equal for faults that are taken for one: errors by their type."""
        return self.kind, self.what.split(":")[0] if self.kind in ("crash", "refused") else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="how many programs (200)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the first; each next has the next (0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported stays: measuring needn't look through it each time
    began, found = time.perf_counter(), Counter[str]()
    for seed in range(options.seed, options.seed + options.count):
        program = draw_program(seed)
        fault = check(program)
        if options.count == 1 and fault is None:
            print(program.source())
        if fault is not None:
            found[fault.kind] += 1
            _tell(program, fault)
        done = seed - options.seed + 1
        if done % 100 == 0 or done == options.count:
            counts = ", ".join(f"{found[kind]} {kind}" for kind in (*BREAKING, "peak", "refused"))
            print(f"{done} programs in {time.perf_counter() - began:.0f} s: {counts}", flush=True)
    return int(any(found[kind] for kind in BREAKING))


def _tell(program: Program, fault: Fault) -> None:
    print(f"seed {program.seed}: {fault.kind}: {fault.what}", flush=True)
    if fault.kind in BREAKING:
        small, fault = shrunk(program, fault)
        print(f"--- made smaller: {fault.what}\n{small.source(fault.budget)}\n---", flush=True)


def check(program: Program) -> Fault | None:
    """Optimize a program and hold it to its model; None where nothing is wrong. Raises what the model itself raises."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = list(_calls(program, _model(program)))
        budget: Any = program.budget
        try:
            if program.as_bytes:
                budget = _bytes(program, float(program.budget))
            streamed = _optimized(program, budget)
            found = list(_calls(program, streamed))
            taken = measure_peak(streamed, *_inputs(program)).peak_bytes
        except fxstream.CaptureError as error:
            return Fault("refused", str(error).strip().splitlines()[-2:][0].strip())
        except Exception as error:
            return Fault("crash", f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}", budget)
        return _difference(program, wanted, found, budget) or _excess(streamed.plans[0], taken, budget)


def _model(program: Program, double: bool = False) -> nn.Module:
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(program.module_source(), space)
    torch.manual_seed(program.seed)
    model = space["Program"]().requires_grad_(False).eval()
    return model.double() if double else model


def _inputs(program: Program, call: int = 0, double: bool = False) -> list[Tensor]:
    space: dict[str, Any] = {"torch": torch}
    torch.manual_seed(program.seed + call)
    exec(program.inputs_source(), space)
    found = [space[name] for name, _ in program.inputs]
    return [x.double() for x in found] if double else found


def _calls(program: Program, model: nn.Module, double: bool = False) -> Iterator[list[Tensor]]:
    """What calls return, leave in their inputs and in the model's buffers, the next random number, and strides."""
    for call in range(CALLS):
        args = _inputs(program, call, double)
        torch.manual_seed(call)
        results = model(*args)
        yield [x.clone() for x in (*results, *args, *model.buffers(), torch.rand(1), *map(_strides, results))]


def _strides(x: Tensor) -> Tensor:
    """How a result is laid out; where it has no second element to step to, no caller sees a difference."""
    return torch.tensor([stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1])


def _bytes(program: Program, share: float) -> int:
    """A share of the activations' peak as a budget in bytes, weights and inputs with it."""
    before = fxstream.plan(_model(program), _inputs(program), memory_budget="1TiB").before
    return before.weight_bytes + before.input_bytes + int(share * before.peak_bytes)


def _optimized(program: Program, budget: Any, double: bool = False) -> Any:
    """The optimized module; that for the lowest budget where a lower one was asked for."""
    model, args = _model(program, double), _inputs(program, 0, double)
    options: Any = {"example_args": args, "allow_recompute": program.allow_recompute}
    try:
        return fxstream.optimize(model, budget, **options)
    except fxstream.MemoryBudgetError as error:
        if error.lowest_bytes <= error.budget_bytes:
            raise
        return fxstream.optimize(model, "min", **options)


def _difference(program: Program, wanted: Any, found: Any, budget: Any) -> Fault | None:
    apart = _apart(wanted, found)
    if apart is None or (apart[0] < MOST_ROUNDING and _is_rounding(program, budget)):
        return None
    return Fault("wrong", apart[1], budget)


def _apart(wanted: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], near: float = NEAR) -> Any:
    """How far, and in words, where two series of calls are not alike; infinitely far in shape or type."""
    for call, (own, got) in enumerate(zip(wanted, found, strict=True)):
        for place, (reference, value) in enumerate(zip(own, got, strict=True)):
            where = f"call {call}, tensor {place}"
            if (value.shape, value.dtype) != (reference.shape, reference.dtype):
                return float(
                    "inf"
                ), f"{where} is {value.dtype}{[*value.shape]}, not {reference.dtype}{[*reference.shape]}"
            far = relative_l2(value, reference) if reference.any() else float(value.double().norm())
            if not far <= near:
                return far, f"{where} is off by {far:.1e}"
    return None


def _is_rounding(program: Program, budget: Any) -> bool:
    """Whether the same in float64 is as near as float64 is."""
    try:
        wanted, found = (
            list(_calls(program, model, True)) for model in (_model(program, True), _optimized(program, budget, True))
        )
    except (RuntimeError, fxstream.FxstreamError):
        return False
    return _apart(wanted, found, NEAR_DOUBLE) is None


def _excess(plan: fxstream.Plan, taken: int, budget: Any) -> Fault | None:
    before, after = plan.before.peak_bytes, plan.after.peak_bytes
    if after > before:
        return Fault("above", f"{after} bytes are planned, the captured graph holds {before}", budget)
    if abs(taken - after) > max(SHARE * after, LEAST):
        return Fault("peak", f"{taken} bytes measured, {after} planned ({taken / max(after, 1) - 1:+.0%})", budget)
    return None


def shrunk(program: Program, fault: Fault, tries: int = 80) -> tuple[Program, Fault]:
    """A smaller program with a fault of the same sort, and that fault."""
    smaller = True
    while smaller and tries:
        smaller = False
        for candidate in _smaller(program):
            tries -= 1
            try:
                found = check(candidate)
            except Exception:  # the smaller model itself doesn't run
                found = None
            if found is not None and found.sort == fault.sort:
                program, fault, smaller = candidate, found, True
                break
            if not tries:
                break
    return program, fault


def _smaller(program: Program) -> Iterator[Program]:
    """Programs with less in them: fewer results, lines, inputs, options."""
    made = [line.makes for line in program.lines if line.makes]
    for name in [*made, *(name for name, _ in program.inputs)]:
        if program.results != (name,):
            yield _needed(replace(program, results=(name,)))
    for index, line in enumerate(program.lines):
        rest = program.lines[:index] + program.lines[index + 1 :]
        stands = sorted(line.reads) if line.makes else [""]
        for other in stands:
            yield _needed(_renamed(replace(program, lines=rest), line.makes, other))
    if len(program.results) > 1:
        for index in range(len(program.results)):
            yield replace(program, results=program.results[:index] + program.results[index + 1 :])
    if program.allow_recompute:
        yield replace(program, allow_recompute=False)
    if program.budget != "min":
        yield replace(program, budget="min", as_bytes=False)


def _renamed(program: Program, name: str, other: str) -> Program:
    """The program with a value that isn't made any more replaced by another."""
    if not name:
        return program
    lines = tuple(line.renamed(name, other) for line in program.lines)
    return replace(program, lines=lines, results=tuple(other if each == name else each for each in program.results))


def _needed(program: Program) -> Program:
    """The program without the lines that no result needs; those that write stay."""
    wanted, lines = set(program.results), list[Line]()
    for line in reversed(program.lines):
        if not line.makes or line.makes in wanted:
            wanted |= line.reads
            lines.append(line)
    return replace(program, lines=tuple(reversed(lines)))


if __name__ == "__main__":
    sys.exit(main())
