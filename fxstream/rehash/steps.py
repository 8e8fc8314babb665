"""The graphs of a rehashed call: full, skip and watch, each planned beside what is held between steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate
from torch import fx

from fxstream.budget import Resident, format_bytes
from fxstream.passes.graph.call import Captured, Inputs
from fxstream.passes.graph.capture import bind, owner
from fxstream.passes.graph.flops import flops
from fxstream.passes.graph.structure import flatten
from fxstream.passes.graph.turns import turn
from fxstream.passes.rewriting.cut import find_cut, first_joint
from fxstream.passes.rewriting.split import split, subgraph
from fxstream.rehash.settings import StepRehash
from fxstream.report import Plan

TIMESTEPS = ("timestep", "timesteps")
"""Names that a model's signature has for the timestep."""

Fit = Callable[[fx.GraphModule, int], tuple[Callable[..., Any], Plan]]
"""Rewrites a graph to the budget beside some bytes that are held, and compiles it if that was asked for."""


@dataclass(frozen=True)
class RehashPlan:
    """What the steps of a generation take: the plans of its ``full`` and its ``skip`` graph, and of the ``watch`` graph
    that computes the early value for a threshold.

    ``cut`` are the nodes whose values are held, ``module_paths`` the modules that made them. ``cut_bytes`` is what they
    hold once, ``held_bytes`` what is held between steps in all, for ``calls`` calls at each timestep. FLOPs are those
    of one call.
    """

    full: Plan
    skip: Plan
    watch: Plan | None
    cut: tuple[str, ...]
    module_paths: tuple[str, ...]
    cut_bytes: int
    held_bytes: int
    calls: int
    full_held_bytes: int
    skip_held_bytes: int
    full_flops: int
    skip_flops: int
    watch_flops: int

    @property
    def largest(self) -> tuple[Plan, int]:
        """The plan of the graph at which most is held, and the bytes that are held for other steps meanwhile."""
        found = [(self.full, self.full_held_bytes), (self.skip, self.skip_held_bytes)]
        if self.watch is not None:
            found.append((self.watch, self.held_bytes))
        return max(found, key=lambda each: each[0].peak_bytes + each[1])

    @property
    def peak_bytes(self) -> int:
        """The most that a call allocates or finds held, over weights and inputs."""
        plan, held = self.largest
        return plan.peak_bytes + held

    @property
    def input_bytes(self) -> int:
        return self.full.input_bytes

    def __str__(self) -> str:
        where = ", ".join(f"{n} of {path or 'the model'}" for n, path in zip(self.cut, self.module_paths, strict=True))
        rows = [
            ("full", self.full.after.peak_bytes, self.full_held_bytes, self.full_flops),
            ("skipped", self.skip.after.peak_bytes, self.skip_held_bytes, self.skip_flops),
        ]
        shown = [
            [name, *map(format_bytes, (peak, held, peak + held)), f"{count / self.full_flops:.1%}"]
            for name, peak, held, count in rows
        ]
        table = tabulate(shown, headers=["step", "activations", "held", "both", "FLOPs"], stralign="right")
        return f"Cut at {where}\n\n{table}\n\nFull steps:\n{self.full}\n\nSkipped steps:\n{self.skip}"


@dataclass(frozen=True)
class Planned:
    """The graphs as they run. ``full`` returns the results and then the cut's values, which ``skip`` takes last."""

    full: Callable[..., Any]
    skip: Callable[..., Any]
    watch: Callable[..., Any] | None
    plan: RehashPlan


class StepGraphs:
    """A captured call, split at its cut.

    ``latent`` and ``timestep`` are the indices of these among the call's tensors; ``results`` counts the model's own.
    Raises ``ValueError`` where the cut can't be made.
    """

    def __init__(
        self,
        captured: Captured,
        latent: int,
        timestep: int,
        rehash: StepRehash,
        fit: Fit,
        resident: Resident | None = None,
    ) -> None:
        self.captured = captured
        self.resident = resident
        self.rehash = rehash
        self.fit = fit
        self.latent, self.timestep = latent, timestep
        graph_module = captured.graph_module
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        here = placeholders[self.latent], placeholders[self.timestep]
        self.results = len(graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
        self.split = split(graph_module, cut_values(graph_module, *here, rehash))
        self.watch = None if rehash.threshold is None else subgraph(graph_module, [first_joint(graph_module, *here)])
        graphs = [graph_module, self.split.skip, *([self.watch] if self.watch else [])]
        self.flops = [sum(flops(graph).values()) for graph in graphs]
        self._planned: dict[int, Planned] = {}

    @property
    def plan(self) -> RehashPlan:
        """The plan for the most calls at a timestep that have been seen."""
        return self._planned[max(self._planned)].plan

    def planned(self, calls: int) -> Planned:
        """The graphs planned for generations of so many calls at each timestep, each of which holds its values."""
        if calls not in self._planned:
            self._plan(calls)
        return self._planned[calls]

    @turn()
    def _plan(self, calls: int) -> None:
        if calls not in self._planned:
            size, history = self.split.bytes, self.rehash.history
            held = calls * history * size
            # During a full call its own oldest value is gone; a predicted value stands beside those that it is made of.
            beside = held - size, held + (size if history > 1 else 0)
            (full, full_plan), (skip, skip_plan) = (
                self.fit(graph, bytes_)
                for graph, bytes_ in zip((self.split.full, self.split.skip), beside, strict=True)
            )
            watch, watch_plan = (None, None) if self.watch is None else self.fit(self.watch, held)
            full_flops, skip_flops, *watch_flops = self.flops
            plan = RehashPlan(
                full=full_plan,
                skip=skip_plan,
                watch=watch_plan,
                cut=self.split.nodes,
                module_paths=self.split.module_paths,
                cut_bytes=size,
                held_bytes=held,
                calls=calls,
                full_held_bytes=beside[0],
                skip_held_bytes=beside[1],
                full_flops=full_flops,
                skip_flops=skip_flops,
                watch_flops=sum(watch_flops),
            )
            self._planned[calls] = Planned(full, skip, watch, plan)


def cut_values(graph_module: fx.GraphModule, latent: fx.Node, timestep: fx.Node, rehash: StepRehash) -> list[fx.Node]:
    """The values at which ``rehash`` cuts a graph."""
    names = [rehash.cut] if isinstance(rehash.cut, str) else rehash.cut
    cuts = [find_cut(graph_module, name, latent, timestep, branch=rehash.branch, keep=rehash.keep) for name in names]
    return list(dict.fromkeys(node for cut in cuts for node in cut))


def places(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None
) -> tuple[int, int]:
    """The indices of the latent and of the timestep among a call's tensors.

    The timestep is the argument called so (or ``name``), else the only tensor of at most one dimension; the latent is
    the first of the signature's other tensors. Raises ``ValueError`` where they can't be told.
    """
    module, _ = owner(model)
    bound = bind(model, args, kwargs)
    inputs = Inputs.of(args, kwargs)
    arguments: dict[str, Any] = {}
    for parameter, value in bound.arguments.items():
        kind = bound.signature.parameters[parameter].kind
        arguments.update(value if kind is inspect.Parameter.VAR_KEYWORD else {parameter: value})
    index = {id(tensor): number for number, tensor in reversed(list(enumerate(inputs.tensors)))}
    tensors = {key: [x for x in flatten(value)[0] if id(x) in index] for key, value in arguments.items()}
    who = type(module).__name__
    if name is None:
        named = [key for key in TIMESTEPS if key in arguments]
        small = [key for key, found in tensors.items() if found and all(x.ndim <= 1 for x in found)]
        if not named and len(small) != 1:
            raise ValueError(
                f"no argument of {who} is called timestep, and {len(small)} of them are tensors of at most one "
                f"dimension ({', '.join(small) or 'none'}): name it by StepRehash(timestep=...)"
            )
        name = (named or small)[0]
    if name not in arguments:
        raise ValueError(f"{who} was called without an argument {name!r}: its arguments are {', '.join(arguments)}")
    if len(tensors[name]) != 1:
        raise ValueError(f"{name} of {who} is {arguments[name]!r}, but Step Rehash reads it as a tensor: pass one")
    (timestep,) = tensors[name]
    latent = next((x for key, found in tensors.items() if key != name for x in found if x.ndim > 1), None)
    if latent is None:
        raise ValueError(
            f"{who} was called without a latent: none of its other arguments is a tensor of two dimensions"
        )
    return index[id(latent)], index[id(timestep)]
