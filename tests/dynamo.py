"""What tests of torch.compile begin with, and what they count."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled yet, nothing counted, and no gradients."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs that Dynamo has traced."""
    return counters["stats"]["unique_graphs"]
