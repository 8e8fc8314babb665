"""What importing costs: the package itself loads none of the large libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fxstream

LARGE = ("torch", "diffusers", "networkx", "tabulate", "fxstream.passes")


def loaded_by(statement: str) -> set[str]:
    """Which of the large libraries a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*(name for name in {LARGE!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_loads_nothing_until_it_is_asked():
    assert loaded_by("import fxstream, fxstream.budget, fxstream.errors\nfxstream.MemoryBudgetError") == set()


def test_the_api_does_not_load_diffusers():
    assert loaded_by("import fxstream\nfxstream.optimize") & {"torch", "diffusers"} == {"torch"}


def test_every_public_name_is_there():
    for name in fxstream.__all__:
        assert getattr(fxstream, name).__name__ == name
    with pytest.raises(AttributeError, match=r"'fxstream' has no attribute 'optimise'"):
        _ = fxstream.optimise
