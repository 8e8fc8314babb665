"""Step Rehash: most steps of a generation take a late value from an earlier step and compute only what follows it.

``StepRehash`` says which steps, which value and how it is predicted; ``RehashedModule`` is the runtime: it finds out
from the timestep where in a generation a call stands, and runs the full graph or the skip graph.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxstream.budget import Budget, Resident
from fxstream.caches import refuse_caches
from fxstream.module import Check, StreamedModule, always
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.places import Place
from fxstream.planned import compiled_by, fit_graph, normalized
from fxstream.rehash.settings import StepRehash
from fxstream.rehash.steps import Planned, RehashPlan, StepGraphs, places
from fxstream.report import Plan

MOST_CALLS = 8
"""Calls at one timestep, each with a cache of its own; one more starts a new generation."""

SAMPLED = 4096
"""Elements of a cut's value, at most, in which drift is measured."""


@dataclass(frozen=True)
class RehashStats:
    """What was computed and what was saved since the module was made or ``reset``.

    ``flops_saved`` and ``seconds_saved`` compare skipped with full calls, the early value's own cost taken off the
    former. ``drift`` has, for each full step but the first of its generation, the relative L1 distance of what a skip
    would have used to the value computed, in a sample of its elements: the latest generation's, and its last call's.
    """

    full_steps: int = 0
    skipped_steps: int = 0
    flops_saved: int = 0
    seconds_saved: float = 0.0
    drift: dict[int, float] = field(default_factory=dict)


@dataclass
class _Totals:
    full_steps: int = 0
    skipped_steps: int = 0
    flops_saved: int = 0
    calls: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    seconds: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    drift: dict[int, float] = field(default_factory=dict)


@dataclass
class Cache:
    """What one call of a step leaves to the next step's: the last full steps' times and values, the latest first.

    ``damping`` is the share of Taylor's correction that is applied: what would have served best at the last full step,
    none before that can be told.
    """

    graphs: StepGraphs
    history: list[tuple[float, tuple[Tensor, ...]]] = field(default_factory=list)
    damping: float = 0.0


class Generation:
    """Where in a generation a call stands, told from its timestep, and the caches of its calls.

    A generation moves through its timesteps in one direction, downwards until it is seen to move upwards twice in a
    row. A move against it, or another kind of call, begins a new one. Further calls at a timestep are branches of
    guidance or a scheduler's second evaluations; at the first timestep they have the same latent as the first call and
    some other input, else they begin a new generation.
    """

    def __init__(self) -> None:
        self.time: float | None = None
        self.direction = -1.0
        self.turned = False
        self.begin()

    def begin(self) -> None:
        """Forget all of the generation so far."""
        self.step = self.call = self.skips = 0
        self.caches: list[Cache] = []
        self.marks: list[list[Tensor]] = []
        self.watched: Tensor | None = None
        self.full = True

    def enter(self, time: float, graphs: StepGraphs, tensors: Sequence[Tensor]) -> Cache:
        """Note a call; the cache that it shares with its like in the steps before and after."""
        before, self.time = self.time, time
        if before is None:
            self.begin()
        elif time == before:
            self.call += 1
            if self.call == MOST_CALLS or (self.step == 0 and self._repeats(graphs, tensors)):
                self.begin()
        elif (time - before) * self.direction > 0:
            self._advance()
        elif self.turned:
            self.direction = -self.direction
            self._advance()
        else:
            self.begin()
            self.turned = True
        if self.call < len(self.caches) and self.caches[self.call].graphs is not graphs:
            if self.call == 0:
                self.begin()
            else:
                self.caches[self.call] = Cache(graphs)
        if self.step == 0:
            self.marks.append([_sample(x) for x in tensors])
        if self.call == len(self.caches):
            self.caches.append(Cache(graphs))
        return self.caches[self.call]

    def _advance(self) -> None:
        self.step, self.call, self.turned, self.marks = self.step + 1, 0, False, []

    def _repeats(self, graphs: StepGraphs, tensors: Sequence[Tensor]) -> bool:
        """Whether a call at the first timestep has another latent than the first, or all inputs of one before."""
        marks = [_sample(x) for x in tensors]
        first = self.marks[0][self.caches[0].graphs.latent]
        if not _equal([first], [marks[graphs.latent]]):
            return True
        return any(_equal(known, marks) for known in self.marks)


class RehashedModule(StreamedModule):
    """A streamed module that computes some steps of a generation in full and skips most of the others.

    What a step does depends on those before it, so torch.compile leaves it to Python. Each thread is in a generation of
    its own. ``enabled = False`` computes every call in full and holds nothing.
    """

    def __init__(self, model: Callable[..., Any], compiler: Any, rehash: StepRehash, fits: Check = always) -> None:
        super().__init__(model, compiler, fits=fits)
        self._rehash = rehash
        self._enabled = True
        self._lock = threading.Lock()
        self.reset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "enabled":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def plans(self) -> tuple[RehashPlan, ...]:  # type: ignore[override]
        """The plans made so far, in the order of their first calls."""
        return tuple(graphs.plan for graphs in list(self._compiled.values()))  # type: ignore[misc]

    @property
    def enabled(self) -> bool:
        """Whether steps are skipped."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        self._threads = threading.local()

    def forget(self) -> None:
        """Forget the generation that this thread is in, and free what it holds."""
        self._threads.__dict__.pop("generation", None)

    def reset(self) -> None:
        """Forget all generations, of every thread, and the statistics."""
        self._threads = threading.local()
        self._totals = _Totals()

    def stats(self) -> RehashStats:
        """What was computed and saved since the last ``reset``, by all threads."""
        with self._lock:
            t = self._totals
            saved = 0.0
            if t.calls[True] and t.calls[False]:
                saved = t.calls[False] * t.seconds[True] / t.calls[True] - t.seconds[False]
            return RehashStats(t.full_steps, t.skipped_steps, t.flops_saved, saved, dict(t.drift))

    def _run(self, compiled: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        graphs: StepGraphs = compiled
        if not self._enabled:
            planned = graphs.planned(1)
            return planned.full(*tensors)[: graphs.results]
        threads = self._threads
        generation = threads.__dict__.setdefault("generation", Generation())
        try:
            return self._step(generation, graphs, tensors)
        except BaseException:
            # Whatever failed, nothing of this generation is used again.
            threads.__dict__.pop("generation", None)
            raise

    def _step(self, generation: Generation, graphs: StepGraphs, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        rehash = self._rehash
        now = float(tensors[graphs.timestep].max())
        cache = generation.enter(now, graphs, tensors)
        if generation.call == 0:
            self._check_place(generation, now)
        planned = graphs.planned(len(generation.caches))
        began = time.perf_counter()
        if generation.call == 0:
            self._decide(generation, planned, tensors)
        full = generation.full or not cache.history
        if full:
            history, cache.history = cache.history, []
            known = [(then, tuple(map(_sample, values))) for then, values in history]
            del history[rehash.history - 1 :]  # with "reuse" the old value is freed before the new one is computed
            found = planned.full(*tensors)
            results, values = found[: graphs.results], tuple(found[graphs.results :])
            drift = _measure(cache, known, now, tuple(map(_sample, values))) if known else None
            cache.history = [(now, values), *history]
        else:
            results = planned.skip(*tensors, *_predict(cache.history, now, cache.damping))
            drift = None
        if tensors[0].device.type != "cpu":
            torch.accelerator.synchronize()
        self._count(generation, planned, full, time.perf_counter() - began, drift)
        return results

    def _check_place(self, generation: Generation, now: float) -> None:
        rehash, step = self._rehash, generation.step
        if rehash.steps is not None and step >= rehash.steps:
            raise ValueError(
                f"the schedule is for {rehash.steps} steps, but this generation goes on after them, at timestep {now:g}"
            )
        if rehash.calibration is not None:
            rehash.calibration.check_time(step, now)

    def _decide(self, generation: Generation, planned: Planned, tensors: Sequence[Tensor]) -> None:
        """Whether this step is full, for all of its calls."""
        watched, change = None, None
        if planned.watch is not None:
            watched = _sample(planned.watch(*tensors)[0])
            if generation.watched is not None:
                change = _distance((generation.watched,), (watched,))
        generation.full = self._rehash.is_full(generation.step, generation.skips, change)
        if generation.full:
            generation.skips = 0
            generation.watched = watched
        else:
            generation.skips += 1

    def _count(self, generation: Generation, planned: Planned, full: bool, seconds: float, drift: float | None) -> None:
        with self._lock:
            totals = self._totals
            if generation.call == 0:
                totals.full_steps += full
                totals.skipped_steps += not full
            totals.calls[full] += 1
            totals.seconds[full] += seconds
            if not full:
                totals.flops_saved += planned.plan.full_flops - planned.plan.skip_flops
            if generation.call == 0:
                totals.flops_saved -= planned.plan.watch_flops
            if drift is not None:
                totals.drift[generation.step] = drift


History = Sequence[tuple[float, tuple[Tensor, ...]]]


def _predict(history: History, now: float, damping: float) -> tuple[Tensor, ...]:
    """The values at ``now``: the latest, and ``damping`` of the way from it to the polynomial through all of them."""
    if len(history) == 1 or not damping:
        return history[0][1]
    times = [then for then, _ in history]
    weights = []
    for here in times:  # Lagrange's form
        factors = [(now - other) / (here - other) for other in times if other != here]
        weights.append(damping * math.prod(factors))
    weights[0] += 1 - damping
    predicted = []
    for values in zip(*(values for _, values in history), strict=True):
        total = values[0] * weights[0]
        for weight, value in zip(weights[1:], values[1:], strict=True):
            total.add_(value, alpha=weight)
        predicted.append(total)
    return tuple(predicted)


def _measure(cache: Cache, known: History, now: float, found: tuple[Tensor, ...]) -> float:
    """The drift at a full step, in samples of its values; sets the damping that would have served best."""
    drift = _distance(_predict(known, now, cache.damping), found)
    if len(known) > 1:
        along = across = 0.0
        for latest, ahead, value in zip(known[0][1], _predict(known, now, 1.0), found, strict=True):
            correction = (ahead - latest).double()
            along += float((correction * (value - latest)).sum())
            across += float(correction.square().sum())
        cache.damping = min(max(along / across, 0.0), 1.0) if across else 0.0
    return drift


def _sample(value: Tensor) -> Tensor:
    """At most ``SAMPLED`` of a tensor's elements, evenly spread over its dimensions, copied."""
    step = max(1, round((value.numel() / SAMPLED) ** (1 / max(value.ndim, 1)) + 0.5)) if value.numel() > SAMPLED else 1
    return value[(slice(None, None, step),) * value.ndim].clone()


def _equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(a.shape == b.shape and a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _distance(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The relative L1 distance of some tensors to others."""
    off = sum(
        (value - reference).abs().sum(dtype=torch.float32) for value, reference in zip(values, references, strict=True)
    )
    size = sum(reference.abs().sum(dtype=torch.float32) for reference in references)
    return float(off / size) if size else float("inf")


def rehash_module(
    model: Callable[..., Any],
    budget: Budget | None,
    rehash: StepRehash,
    allow_recompute: bool = False,
    backend: str | None = None,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None = None,
    fits: Check = always,
) -> RehashedModule:
    """A module that skips steps; without a budget its graphs run as they were captured."""

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any], live: Collection[Place]) -> StepGraphs:
        refuse_caches(model)
        if rehash.calibration is not None:
            rehash.calibration.check_model(model)
        latent, timestep = places(model, args, kwargs, rehash.timestep)
        began = time.perf_counter()
        held = None if resident is None else resident(Inputs.of(args, kwargs).tensors)
        captured = capture(model, args, kwargs, live)
        captured.state.refuse_tensors("Step Rehash")
        normalized(captured)
        before, seconds = profile(captured.graph_module), time.perf_counter() - began

        def fit(graph_module: fx.GraphModule, held_bytes: int) -> tuple[Callable[..., Any], Plan]:
            fitted, made = fit_graph(graph_module, budget, seconds, allow_recompute, held, held_bytes, before)
            return compiled_by(backend, fitted), made

        graphs = StepGraphs(captured, latent, timestep, rehash, fit, held)
        graphs.planned(1)
        return graphs

    return RehashedModule(model, compiler, rehash, fits)
