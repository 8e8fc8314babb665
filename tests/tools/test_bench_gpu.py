"""The benchmark for a card: dry, it goes the same ways on the CPU, and its records say what was compared."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fxstream.tools.bench_gpu import GROUPS, calls


def test_it_runs_dry(tmp_path):
    out = tmp_path / "found.json"
    own = [sys.executable, "-m", "fxstream.tools.bench_gpu", "--dry", "--out", str(out)]
    done = subprocess.run(own, capture_output=True, text=True, check=True)
    found = json.loads(out.read_text())
    records = {record["check"]: record for record in found["records"]}
    assert found["dry"]
    assert all(record["ok"] for record in records.values()), done.stdout
    assert {name.split(":")[0].split()[0] for name in records} == {
        *("environment", "workspace", "norm", "small", "large", "pipeline"),
    }
    assert len(GROUPS) == 6
    streamed = records["small: svd-vae float32, min"]
    assert streamed["measured"]["allocated"] == streamed["planned"]["allocated"]
    assert streamed["relative_l2"] <= 1e-6
    assert "checks are good" in done.stdout


def test_a_check_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    from fxstream.tools.bench_gpu import Bench

    bench = Bench(True, float("inf"), tmp_path / "found.jsonl")
    with bench.check("first"):
        raise RuntimeError("not here")
    with bench.check("second") as record:
        record["value"] = 3
    with pytest.raises(TimeoutError), Bench(True, 0.0, bench.path).check("third"):
        pytest.fail("there was no time for it")
    first, second, third = map(json.loads, bench.path.read_text().splitlines())
    assert (first["ok"], first["error"]) == (False, "not here")
    assert (second["ok"], second["value"]) == (True, 3)
    assert (third["ok"], third["error"]) == (False, "no time is left")


def test_its_calls_are_of_operators_that_allocate():
    names = [name for name, target, args in calls(small=True) if target(*args) is not None]
    assert len(names) == len(set(names)) > 30
    assert torch.is_tensor(next(iter(calls(small=True)))[2][0])
