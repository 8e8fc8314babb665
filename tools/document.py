"""An inspection as plain data: what `--json` writes, and what the other forms of output are made from."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from fxstream.passes.graph.liveness import MemoryProfile
    from fxstream.report import Plan

FORMAT = "fxstream plan 1"
"""What tells such a document from other JSON; the number changes where readers would have to."""

Document = dict[str, Any]


def document(plan: Plan, graph_module: fx.GraphModule, about: dict[str, Any]) -> Document:
    """A plan and the graph that it rewrote. All sizes are bytes; ``about`` says what was planned.

    `before` and `after` have the schedule as `nodes`, and as `tensors` each storage with the positions in the schedule
    between which it lives, both included. What is live at a node and is no tensor's is inside it: a kernel's workspace,
    or a loop. `fetched` are the weights that live on disk, `spilled` the activations, `moved_bytes` what a call reads
    and writes of both; `resident_weight_bytes` are those of the other weights.
    """
    from fxstream.tools.listing import loop_listings

    code = loop_listings(graph_module)
    return {
        "format": FORMAT,
        "fxstream": version("fxstream"),
        **about,
        "budget_bytes": plan.budget_bytes,
        "weight_bytes": plan.weight_bytes,
        "input_bytes": plan.input_bytes,
        "added_flops": plan.added_flops,
        "before": _profile(plan.before),
        "after": _profile(plan.after),
        "groups": [
            {
                **asdict(group),
                "spans": list(map(list, group.spans)),
                "lengths": list(group.lengths),
                "slices": group.slices,
                "code": code.get(group.name, group.code),
            }
            for group in plan.groups
        ],
        "barriers": [asdict(barrier) for barrier in plan.barriers],
        "machine": plan.machine,
        "unmeasured": [asdict(operator) for operator in plan.unmeasured],
        "resident_weight_bytes": plan.after.weight_bytes,
        "moved_bytes": plan.moved_bytes,
        "fetched": [asdict(weight) for weight in plan.fetched],
        "spilled": [asdict(value) for value in plan.spilled],
        "seconds": plan.seconds,
    }


def _profile(profile: MemoryProfile) -> Document:
    nodes = zip(profile.nodes, profile.module_paths, profile.live_bytes, strict=True)
    return {
        "peak_bytes": profile.peak_bytes,
        "peak_index": profile.peak_index,
        "nodes": [{"name": name, "module": path, "live_bytes": live} for name, path, live in nodes],
        "tensors": [
            {
                "node": tensor.node,
                "module": tensor.module_path,
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.bytes,
                "birth": tensor.birth,
                "death": tensor.death,
            }
            for tensor in profile.tensors
        ],
    }


def to_json(found: Document) -> str:
    """A document as JSON, on one line."""
    return json.dumps(found) + "\n"


def to_csv(found: Document) -> str:
    """The two schedules as one table: which, position, node, module, bytes live."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["schedule", "position", "node", "module", "live_bytes"])
    for which in ("before", "after"):
        for position, node in enumerate(found[which]["nodes"]):
            writer.writerow([which, position, node["name"], node["module"], node["live_bytes"]])
    return out.getvalue()
