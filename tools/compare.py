"""`fxstream compare`: two plans side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxstream.budget import format_bytes
from fxstream.tools.document import FORMAT, Document
from fxstream.tools.errors import UsageError
from fxstream.tools.files import STDOUT, check_writable, write
from fxstream.tools.inspection import inspect

SHOWN_LOOPS = 40


def run(args: argparse.Namespace) -> int:
    """The command."""
    check_writable({"--json": args.json})
    plans = [_read(name, args) for name in (args.first, args.second)]
    rows = summary(*plans)
    loops = differing_loops(*plans)
    if args.json:
        content = {"plans": [plan["target"] for plan in plans], "summary": rows, "loops": loops}
        write(args.json, json.dumps(content, indent=1) + "\n", args.quiet)
    if args.json != STDOUT:
        print(_summary_table(rows, args))
        print("\n" + _loops_table(loops, plans))
    return 0


def _read(name: str, args: argparse.Namespace) -> Document:
    """A plan that was saved, or the plan of a target."""
    path = Path(name)
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{name} is no JSON ({error}); give what `fxstream inspect --json FILE` wrote") from None
        if isinstance(found, dict) and str(found.get("format", "")).startswith("fxstream plan"):
            if found["format"] != FORMAT:
                raise UsageError(f"{name} is a {found['format']!r}, this version reads {FORMAT!r}; inspect it again")
            return found
    args.measure, args.offload = False, None
    return inspect(name, args).found


MEASURES: dict[str, Callable[[Document], int]] = {
    "activation peak before": lambda plan: plan["before"]["peak_bytes"],
    "activation peak after": lambda plan: plan["after"]["peak_bytes"],
    "weights": lambda plan: plan["weight_bytes"],
    "inputs": lambda plan: plan["input_bytes"],
    "all before": lambda plan: plan["before"]["peak_bytes"] + plan["weight_bytes"] + plan["input_bytes"],
    "all after": lambda plan: plan["after"]["peak_bytes"] + plan["weight_bytes"] + plan["input_bytes"],
}
FACTS: dict[str, Callable[[Document], Any]] = {
    "model": lambda plan: plan["model"],
    "inputs ": lambda plan: ", ".join(plan["inputs"]),
    "planned for": lambda plan: plan["machine"],
    "budget": lambda plan: plan["budget"],
    "operators": lambda plan: len(plan["before"]["nodes"]),
    "loops": lambda plan: len(plan["groups"]),
    "peak before at": lambda plan: _peak_node(plan["before"]),
    "peak after at": lambda plan: _peak_node(plan["after"]),
    "operators without a rule": lambda plan: len(plan["barriers"]),
}


def _peak_node(profile: dict[str, Any]) -> str:
    return profile["nodes"][profile["peak_index"]]["name"] if profile["nodes"] else ""


def summary(first: Document, second: Document) -> dict[str, list[Any]]:
    """What is told of both plans: of sizes in bytes, the second over the first as well."""
    rows: dict[str, list[Any]] = {name: [of(first), of(second)] for name, of in FACTS.items()}
    for name, of in MEASURES.items():
        a, b = of(first), of(second)
        rows[name] = [a, b, b / a if a else None]
    return rows


def differing_loops(first: Document, second: Document) -> list[dict[str, Any]]:
    """Loops that are in one plan alone, or that differ: None where there is none."""
    mine, others = ({_key(group): group for group in plan["groups"]} for plan in (first, second))
    rows = []
    for key in dict.fromkeys([*mine, *others]):
        pair = [plan.get(key) for plan in (mine, others)]
        told = [None if group is None else {k: group[k] for k in ("axis", "slices", "bytes_after")} for group in pair]
        if told[0] != told[1]:
            rows.append({"module": key[0], "nodes": f"{key[1]} .. {key[2]}", "first": told[0], "second": told[1]})
    return rows


def _key(group: dict[str, Any]) -> tuple[str, str, str]:
    return group["module_path"], group["first"], group["last"]


def _summary_table(rows: dict[str, list[Any]], args: argparse.Namespace) -> str:
    shown = [
        [name, *map(format_bytes, values[:2]), "" if values[2] is None else f"{values[2]:.2f}"]
        if name in MEASURES
        else [name.strip(), *values, ""]
        for name, values in rows.items()
    ]
    headers = ["", args.first, args.second, "B / A"]
    return tabulate(shown, headers=headers, disable_numparse=True, maxcolwidths=[None, 40, 40, None])


def _loops_table(loops: list[dict[str, Any]], plans: list[Document]) -> str:
    if not loops:
        return "The loops are the same."
    rows = [
        [row["nodes"], row["module"], *(_loop(row[which]) for which in ("first", "second"))]
        for row in loops[:SHOWN_LOOPS]
    ]
    same = len({_key(group) for group in plans[0]["groups"]}) - sum(row["first"] is not None for row in loops)
    more = f"\n... and {len(loops) - SHOWN_LOOPS} more" if len(loops) > SHOWN_LOOPS else ""
    table = tabulate(rows, headers=["nodes", "module", "A", "B"])
    return f"Loops: {same} are the same, {len(loops)} differ.\n{table}{more}"


def _loop(told: dict[str, Any] | None) -> str:
    return "none" if told is None else f"{told['slices']} of {told['axis']}, {format_bytes(told['bytes_after'])}"
