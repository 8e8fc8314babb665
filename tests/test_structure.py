"""The arrows between folders and files: which imports which, read off every import statement, typing's too."""

from __future__ import annotations

import ast

import networkx as nx
import pytest

from fxstream.tools.structure import ROOT, arrows, diagram, files

FOLDERS = {
    "runtime": set(),
    "passes/machine": {"runtime", "passes/operators"},
    "passes/operators": {"runtime"},
    "passes/graph": {"runtime", "passes/machine", "passes/operators"},
    "passes/planning": {"runtime", "passes/machine", "passes/operators", "passes/graph"},
    "passes/rewriting": {"runtime", "passes/machine", "passes/operators", "passes/graph", "passes/planning"},
    "passes": {f"passes/{name}" for name in ("machine", "operators", "graph", "planning", "rewriting")} | {"runtime"},
}
"""What each folder of the compiler may import, but for errors, which everyone may."""

MADE_BELOW = {("fxstream.rehash.settings", "fxstream.rehash.rehash")}
"""Settings that make what they set, when asked: ``StepRehash.around``."""


ARROWS = set(arrows()) - MADE_BELOW


def folder(module: str) -> str:
    """The folder that a module's file stands in, as FOLDERS has it."""
    return str(files()[module].parent.relative_to(ROOT)).removeprefix("fxstream/")


def test_no_files_import_each_other_in_a_circle():
    assert list(nx.simple_cycles(nx.DiGraph(ARROWS))) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_imports_what_it_may(name):
    wrong = {(a, b) for a, b in ARROWS if folder(a) == name and folder(b) not in FOLDERS[name] | {name}}
    assert {(a, b) for a, b in wrong if b != "fxstream.errors"} == set()


def test_the_library_imports_no_tool():
    assert {(a, b) for a, b in ARROWS if folder(b) == "tools" and folder(a) != "tools"} == set()


def test_each_folder_says_what_it_is():
    missing = {path.parent for path in files().values() if not (path.parent / "__init__.py").exists()}
    assert missing == set()
    for path in files().values():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_manual_shows_the_arrows():
    """`python -m fxstream.tools.structure` prints what docs/how-it-works.md has to show."""
    assert f"```mermaid\n{diagram()}\n```" in (ROOT / "docs/how-it-works.md").read_text()
