"""What was measured is kept, by several processes at once, and read again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxstream.passes.machine import workspace
from fxstream.passes.machine.cost import CPU, cost_model, save_prices
from fxstream.passes.machine.kept import Kept, folder, kept
from fxstream.passes.machine.prices import measure_prices

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FXSTREAM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(workspace, "_KNOWN", {})


def test_two_processes_add_to_one_file() -> None:
    first, second = Kept("cpu"), Kept("cpu")
    first.add("a", (8, -8))
    second.add("b", None)
    first.save()
    second.save()
    with first.path.open("a") as file:
        file.write('["c", [4')  # a process that was stopped
    assert Kept("cpu").traces == {"a": (8, -8), "b": None}


def test_a_second_plan_measures_nothing() -> None:
    x = torch.randn(4, 8, 16).transpose(1, 2)
    first = workspace.call_workspace_bytes(aten.layer_norm.default, x, (x, [8]), {})
    kept.cache_clear()
    workspace._KNOWN.clear()
    assert workspace.call_workspace_bytes(aten.layer_norm.default, x, (x, [8]), {}) == first > 0
    assert not kept("cpu", folder())._new


def test_what_another_process_measures_meanwhile_is_not_measured_again() -> None:
    x = torch.randn(4, 8, 16).transpose(1, 2)
    here = kept("cpu", folder())
    Kept("cpu").save()  # the file is there, and empty
    workspace.call_workspace_bytes(aten.layer_norm.default, x, (x, [8]), {})
    ((name, _),) = here.traces.items()
    here.traces.clear()
    workspace._KNOWN.clear()
    other = Kept("cpu")
    other.add(name, (4096, -4096))
    other.save()
    assert workspace.call_workspace_bytes(aten.layer_norm.default, x, (x, [8]), {}) == 4096


def test_prices_are_those_measured_here() -> None:
    assert cost_model(torch.device("cpu")) == CPU
    prices = measure_prices(torch.device("cpu"))
    save_prices("cpu", prices)
    assert cost_model(torch.device("cpu")) == prices
    assert 0 < prices.flop < 1e-6
