"""Prints the folders of the project and which imports which, as a Mermaid diagram.

Run with `python -m fxstream.tools.structure`. Read off every import statement, wherever it stands, typing's too;
`docs/how-it-works.md` has what it prints, and the tests hold that, and the arrows, to the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
"""The folder that ``fxstream/``, ``passes/`` and ``tools/`` stand in; the tool is for a checkout."""


@cache
def files() -> dict[str, Path]:
    """The project's files by their modules' names."""
    paths = (path for folder in ("fxstream", "passes", "tools") for path in (ROOT / folder).rglob("*.py"))
    return {_module_name(path): path for path in paths}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("fxstream", *parts) if parts[0] != "fxstream" else parts).removesuffix(".__init__")


def arrows() -> Iterator[tuple[str, str]]:
    """(module, another that it imports); what packages' own files gather is left out."""
    known = {name for name, path in files().items() if path.name != "__init__.py"}
    for name in sorted(known):
        for other in sorted(_imported(files()[name]) & known - {name}):
            yield name, other


def _imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def place(module: str) -> str:
    """Where a module's file stands: its folder, or at the top of ``fxstream/`` and ``passes/`` the file itself."""
    path = files()[module].relative_to(ROOT)
    return str(path if str(path.parent) in ("fxstream", "passes") else path.parent)


def diagram() -> str:
    """An arrow from each place to those that it imports, but for those that longer ways of arrows imply."""
    graph = nx.DiGraph((place(a), place(b)) for a, b in arrows() if place(a) != place(b))
    return "\n".join(["graph TD", *sorted(f"    {a} --> {b}" for a, b in nx.transitive_reduction(graph).edges)])


if __name__ == "__main__":
    print(diagram())
