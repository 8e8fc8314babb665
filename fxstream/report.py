"""Plans: what streaming a call would do to its memory, as data and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from typing import TypeVar

from tabulate import tabulate
from torch import fx

from fxstream.budget import format_bytes
from fxstream.notebook import blocks, timeline
from fxstream.passes.graph.capture import module_path
from fxstream.passes.graph.launches import launches
from fxstream.passes.graph.liveness import MemoryProfile
from fxstream.passes.graph.reserve import Reserve
from fxstream.passes.machine.kept import machine_name
from fxstream.passes.planning.barriers import Barrier, barriers, unmeasured
from fxstream.passes.planning.homes import Homes
from fxstream.passes.planning.tree import Block, Loop, Spill

T = TypeVar("T")

SHOWN_HOLDERS = 6
SHOWN_GROUPS = 20


@dataclass(frozen=True)
class PlannedGroup:
    """One sliced loop of a plan.

    ``name`` is that of its node in the rewritten graph, after those of the loops around it: ``"loop_0/loop_7"``.
    ``first`` and ``last`` are node names, ``spans`` where its nodes are in the schedule before, as runs of positions
    (first, last), and ``module_path`` the innermost of the user's modules around both. The axis
    is the dimension of ``first`` that is cut: its ``extent`` steps run as ``slices`` slices, of ``lengths`` steps.
    ``bytes_before`` and ``bytes_after`` are the most that is live while the group runs, whole and sliced. ``depth`` is
    1 inside another loop's body. ``code`` is the body of the first slice as Python.
    """

    name: str
    first: str
    last: str
    spans: tuple[tuple[int, int], ...]
    module_path: str
    axis: str
    extent: int
    lengths: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    depth: int
    code: str

    @property
    def slices(self) -> int:
        """How many slices the axis is cut into."""
        return len(self.lengths)


@dataclass(frozen=True)
class FetchedWeight:
    """A weight that lives on disk: ``bytes`` of it are read ``times`` in a call, in the loop ``inside`` if not "".

    Those are all of it, or of a table the rows that are looked up. ``name`` is that of the attribute, as the rewritten
    graph has it.
    """

    name: str
    bytes: int
    times: int
    inside: str


@dataclass(frozen=True, repr=False)
class Plan:
    """What streaming one call does: memory ``before`` and ``after`` over weights and inputs, and the loops.

    ``barriers`` are the operators without a rule that axes stop at. ``seconds`` maps "capture" and "planning" to the
    time that each took. ``budget_bytes`` is what activations were allowed, None for the lowest reachable.
    ``added_flops`` are the floating point operations of values that are computed again. ``launches`` are the kernels
    that a call runs, before and after; ``reserve`` is what torch's allocator takes of a CUDA card for all that the
    call holds, None elsewhere. ``machine`` is the one whose kernels' workspaces are counted; ``unmeasured`` are the
    operators whose workspace is not known there, and counts as none, or on an absent card as all that they touch.
    ``fetched`` are the weights that live on disk, of which ``after`` counts as weights none, and ``spilled`` the
    activations that do, of which it counts what loops' slices have in memory.
    """

    before: MemoryProfile
    after: MemoryProfile
    groups: tuple[PlannedGroup, ...]
    barriers: tuple[Barrier, ...]
    budget_bytes: int | None
    seconds: dict[str, float]
    added_flops: int = 0
    launches: tuple[int, int] = (0, 0)
    reserve: Reserve | None = None
    machine: str = ""
    unmeasured: tuple[Barrier, ...] = ()
    fetched: tuple[FetchedWeight, ...] = ()
    spilled: tuple[Spill, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that a call allocates, over weights that stay and inputs."""
        return self.after.peak_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes that a call reads of weights on disk, and writes and reads of activations."""
        return self._read_bytes + sum(value.moved for value in self.spilled)

    @property
    def _read_bytes(self) -> int:
        """Bytes that a call reads of weights on disk."""
        return sum(weight.bytes * weight.times for weight in self.fetched)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weights that the call uses."""
        return self.before.weight_bytes

    @property
    def input_bytes(self) -> int:
        """The bytes of the call's input tensors."""
        return int(self.before.input_bytes)  # torch keeps the size of a view's storage as a symbol

    def __repr__(self) -> str:
        before, after = format_bytes(self.before.peak_bytes), format_bytes(self.after.peak_bytes)
        weights, loops = format_bytes(self.after.weight_bytes), f"{len(self.groups)} loops"
        return f"<Plan: activations {before} before, {after} after; weights {weights}; {loops}>"

    def _repr_html_(self) -> str:
        curves = {"before": self.before.live_bytes, "after": self.after.live_bytes}
        return timeline(curves) + blocks(self._parts())

    def __str__(self) -> str:
        return "\n\n".join(self._parts())

    def _parts(self) -> list[str]:
        parts = [self.summary(), "Held at the peak after:\n" + self.holders_table(self.after)]
        parts.append("Groups:\n" + self._few_groups() if self.groups else "No groups: nothing needs slicing.")
        if self.barriers:
            parts.append("Operators without a rule:\n" + self.barriers_table())
        if self.unmeasured:
            parts.append("Operators whose workspace is not known:\n" + self.unmeasured_table())
        parts.append(f"Planned for: {self.machine}")
        return parts

    def summary(self) -> str:
        """Before and after, in a table."""
        before, after = self.before, self.after
        rows = {
            "peak of activations and fetched weights" if self.fetched else "activation peak": (
                before.peak_bytes,
                after.peak_bytes,
            ),
            "weights that stay" if self.fetched else "weights": (before.weight_bytes, after.weight_bytes),
            "inputs": (self.input_bytes, self.input_bytes),
        }
        rows["all"] = sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values())
        table = [[name, *map(format_bytes, sizes)] for name, sizes in rows.items()]
        text = tabulate(table, headers=["", "before", "after"], stralign="right")
        text += f"\n\nKernels launched: {self.launches[0]:,} before, {self.launches[1]:,} after"
        if self.reserve is not None:
            kind = "expandable segments" if self.reserve.expandable else "segments that don't expand"
            text += f"\n\nOf the card, with {kind}: {format_bytes(self.reserve.allocated)} allocated, "
            text += f"{format_bytes(self.reserve.reserved)} reserved, beside a context"
        if self.added_flops:
            text += f"\n\nValues computed again: {self.added_flops / 1e9:,.1f} GFLOP"
        if self.fetched:
            names = len({weight.name for weight in self.fetched})
            text += f"\n\nWeights on disk: {names}, of which a call reads {format_bytes(self._read_bytes)}"
        if self.spilled:
            size, moved = sum(each.bytes for each in self.spilled), sum(each.moved for each in self.spilled)
            text += f"\n\nActivations on disk: {len(self.spilled)} of {format_bytes(size)} in all, "
            text += f"of which a call writes and reads {format_bytes(moved)}"
        return text

    @staticmethod
    def holders_table(peak: MemoryProfile) -> str:
        """The largest tensors live at a profile's peak."""
        rows = [
            [
                format_bytes(t.bytes),
                "x".join(map(str, t.shape)),
                str(t.dtype).removeprefix("torch."),
                t.node,
                t.module_path,
            ]
            for t in peak.holders[:SHOWN_HOLDERS]
        ]
        rest = sum(tensor.bytes for tensor in peak.holders[SHOWN_HOLDERS:])
        if rest:
            rows.append([format_bytes(rest), "", "", f"{len(peak.holders) - SHOWN_HOLDERS} more", ""])
        if peak.transient_bytes:
            where = peak.nodes[peak.peak_index]
            rows.append(
                [format_bytes(peak.transient_bytes), "", "", f"inside {where}", peak.module_paths[peak.peak_index]]
            )
        return tabulate(rows, headers=["bytes", "shape", "dtype", "node", "module"])

    def _few_groups(self) -> str:
        """The loops that lower memory most, where there are more than a screen of them."""
        if len(self.groups) <= SHOWN_GROUPS:
            return self.groups_table()
        outer = [group for group in self.groups if not group.depth]
        most = sorted(outer, key=lambda group: group.bytes_before - group.bytes_after)[-SHOWN_GROUPS:]
        shown = [group for group in outer if group in most]
        return f"{self.groups_table(shown)}\n{len(self.groups) - len(shown)} more: print(plan.groups_table())"

    def groups_table(self, groups: Sequence[PlannedGroup] | None = None) -> str:
        """The sliced loops in the order that they run: all, or some of them."""
        rows = [
            [
                "  " * group.depth + f"{group.first} .. {group.last}",
                group.module_path,
                group.axis,
                group.slices,
                format_bytes(group.bytes_before),
                format_bytes(group.bytes_after),
            ]
            for group in (self.groups if groups is None else groups)
        ]
        headers = ["nodes", "module", "axis", "slices", "before", "after"]
        return tabulate(rows, headers=headers, preserve_whitespace=True)

    def barriers_table(self) -> str:
        """Operators without a rule, the most bytes first."""
        return self._operators_table(self.barriers)

    def unmeasured_table(self) -> str:
        """Operators whose workspace is not known, the most bytes first."""
        return self._operators_table(self.unmeasured)

    @staticmethod
    def _operators_table(operators: Iterable[Barrier]) -> str:
        rows = [[each.operator, each.count, format_bytes(each.bytes)] for each in operators]
        return tabulate(rows, headers=["operator", "nodes", "largest live bytes"])


def make_plan(
    model: fx.GraphModule,
    before: MemoryProfile,
    block: Block,
    budget_bytes: int | None,
    seconds: dict[str, float],
    homes: Homes | None = None,
    reserve: Reserve | None = None,
) -> Plan:
    """The plan that a streamed graph carries out; ``model`` is the graph as it was captured, with its profile."""
    position = {name: index for index, name in enumerate(before.nodes)}
    groups = tuple(_groups(block, position, (), 0))
    after, blocked = _unfolded(block), barriers(block.program)
    machine, unknown = machine_name(block.program.device.type), unmeasured(block.program)
    fetched: tuple[FetchedWeight, ...] = ()
    if homes is not None:
        stays = ((stay.weight, stay.times, "/".join(stay.path)) for stay in homes.stays)
        fetched = tuple(FetchedWeight(weight.name, weight.bytes, times, inside) for weight, times, inside in stays)
        fetched += tuple(FetchedWeight(lookup.name, lookup.bytes, 1, "") for lookup in homes.lookups)
    moved = fetched, block.spills
    launched = launches(model), launches(block.graph_module)
    made = block.added_flops, launched, reserve, machine, unknown
    return Plan(before, after, groups, blocked, budget_bytes, seconds, *made, *moved)


def _unfolded(block: Block) -> MemoryProfile:
    """The profile of a block, with that of a streamed body in place of its loop's node."""
    profile = block.after
    for loop in block.loops:
        if loop.body is None:
            continue
        name, inner = loop.name, _unfolded(loop.body)
        at = profile.nodes.index(name)
        outside = profile.live_bytes[at] - inner.peak_bytes
        longer = len(inner.nodes) - 1
        around = (
            replace(
                tensor,
                birth=tensor.birth + longer * (tensor.birth > at),
                death=tensor.death + longer * (tensor.death >= at),
            )
            for tensor in profile.tensors
        )
        inside = (replace(tensor, birth=tensor.birth + at, death=tensor.death + at) for tensor in inner.tensors)
        profile = replace(
            profile,
            nodes=_spliced(profile.nodes, at, tuple(f"{name}/{node}" for node in inner.nodes)),
            module_paths=_spliced(profile.module_paths, at, inner.module_paths),
            live_bytes=_spliced(profile.live_bytes, at, tuple(outside + live for live in inner.live_bytes)),
            tensors=tuple(sorted((*around, *inside), key=lambda tensor: tensor.birth)),
        )
    return profile


def _spliced(values: tuple[T, ...], at: int, inner: tuple[T, ...]) -> tuple[T, ...]:
    return (*values[:at], *inner, *values[at + 1 :])


def _groups(block: Block, position: Mapping[str, int], around: tuple[str, ...], outside: int) -> Iterator[PlannedGroup]:
    """The loops of a block inside the loops ``around`` it, which hold ``outside`` bytes; each, then its body's.

    ``position`` is that of each node in the schedule before.
    """
    live = dict(zip(block.after.nodes, block.after.live_bytes, strict=True))
    for loop in block.loops:
        path = (*around, loop.name)
        yield _planned(block, loop, position, path, outside, live[loop.name])
        if loop.body is not None:
            inside = outside + live[loop.name] - loop.body.after.peak_bytes
            yield from _groups(loop.body, position, path, inside)


def _planned(
    block: Block,
    loop: Loop,
    position: Mapping[str, int],
    path: tuple[str, ...],
    outside: int,
    after: int,
) -> PlannedGroup:
    program, group, start, end = block.program, loop.group, loop.group.start, loop.group.end
    inside = [index for index in range(start, end + 1) if index in group.run.slices]
    first, last = program.values[inside[0]].node, program.values[inside[-1]].node
    positions = {
        position[name]
        for node in (program.values[index].node for index in inside)
        if (name := node.name if node.name in position else str(node.meta.get("origin"))) in position
    }
    piece = group.run.slices[inside[0]]
    axis = f"dim {piece.dim}: {piece.extent}"
    if piece.outer > 1 or piece.inner > 1:
        axis += f" of {piece.outer} x {piece.extent} x {piece.inner}"
    paths = [module_path(program.values[index].node).split(".") for index in inside]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return PlannedGroup(
        name="/".join(path),
        first=first.meta.get("origin", first.name),
        last=last.meta.get("origin", last.name),
        spans=tuple(_runs(positions)),
        module_path=".".join(names[0] for names in shared),
        axis=axis,
        extent=group.run.extent,
        lengths=group.lengths,
        bytes_before=outside + max(program.live_bytes[start : end + 1]),
        bytes_after=outside + after,
        depth=len(path) - 1,
        code=next(iter(loop.module.graphs().values())).code,
    )


def _runs(positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive positions, as (first, last)."""
    for _, run in groupby(enumerate(sorted(positions)), key=lambda pair: pair[1] - pair[0]):
        found = [position for _, position in run]
        yield found[0], found[-1]
