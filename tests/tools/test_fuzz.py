"""The fuzzer: programs are drawn from their seeds alone, faults are found, and what has one is made smaller."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxstream.tools import fuzz
from fxstream.tools.fuzz import Fault, check, main, shrunk
from fxstream.tools.fuzz_programs import Line, Program, draw_program

ROLLED = Program(
    seed=3,
    inputs=(("a", "torch.randn([2, 8, 64])"), ("b", "a + 1")),
    lines=(
        Line("v0 = F.silu(a)", "v0", frozenset("a")),
        Line("v1 = self.m1(v0)", "v1", frozenset({"v0"}), ("self.m1 = nn.Conv1d(8, 4, 3)",)),
        Line("v2 = v1.roll(1, 2)", "v2", frozenset({"v1"})),
        Line("v3 = torch.cat([v2, v2], 1)", "v3", frozenset({"v2"})),
        Line("v1.add_(1)", "", frozenset({"v1"})),
    ),
    results=("v3", "v0"),
    budget=0.5,
    allow_recompute=True,
)


def test_a_seed_is_a_program():
    assert draw_program(5) == draw_program(5) != draw_program(6)


def test_programs_have_what_video_models_have():
    text = "\n".join(draw_program(seed).source() for seed in range(150))
    for part in ("nn.Conv2d", "nn.ConvTranspose", "Norm", "attention", ".unflatten(", ".permute(", "F.pad(", ".roll("):
        assert part in text
    for part in (
        "_(",
        "] = ",
        "randn_like",
        "register_buffer",
        "torch.cat",
        "interpolate",
        "_pool",
        ".conj()",
        "b = a",
    ):
        assert part in text


@pytest.mark.parametrize("seed", [0, 2])
def test_a_program_is_held_to_its_model(seed):
    fault = check(draw_program(seed))
    assert fault is None or fault.kind not in fuzz.BREAKING


def test_what_differs_is_found(monkeypatch):
    optimized = fuzz._optimized

    def shifted(program, budget, double=False):
        return optimized(replace(program, lines=tuple(line.renamed("roll", "flip") for line in program.lines)), budget)

    monkeypatch.setattr(fuzz, "_optimized", shifted)
    found = check(
        replace(ROLLED, lines=(*ROLLED.lines[:2], Line("v2 = v1.roll(1)", "v2", frozenset({"v1"})), *ROLLED.lines[3:]))
    )
    assert found is not None and (found.kind, found.what[:26]) == ("wrong", "call 0, tensor 0 is off by")
    monkeypatch.setattr(fuzz, "_optimized", optimized)
    assert (fault := check(ROLLED)) is None or fault.kind == "peak"


def test_a_program_is_made_as_small_as_its_fault_allows(monkeypatch):
    def rolls(program: Program) -> Fault | None:
        fuzz._model(program)(*fuzz._inputs(program))  # which may raise
        return Fault("crash", "Rolled: here") if "roll" in program.module_source() else None

    monkeypatch.setattr(fuzz, "check", rolls)
    small, fault = shrunk(ROLLED, Fault("crash", "Rolled: there"))
    assert [line.code for line in small.lines] == ["v2 = a.roll(1, 2)"]
    assert (small.results, small.budget, small.allow_recompute) == (("v2",), "min", False)
    assert fault.what == "Rolled: here"


def test_the_script_of_a_program_runs(capsys):
    with torch.no_grad():  # which the script sets, too
        exec(replace(ROLLED, budget="min").source(), {"__name__": "script"})
    printed = capsys.readouterr().out
    assert "(2, 8, 62) torch.float32 " in printed and "planned" in printed and "measured" in printed


def test_the_command_counts_faults(capsys, monkeypatch):
    monkeypatch.setattr(fuzz, "check", lambda program: Fault("above", "too much", 5) if program.seed == 1 else None)
    assert main(["--count", "3"]) == 1
    printed = capsys.readouterr().out
    assert "seed 1: above: too much" in printed and "fxstream.optimize(copy.deepcopy(model), 5" in printed
    assert "0 wrong, 0 crash, 1 above, 0 peak, 0 refused" in printed
    assert main(["--count", "1", "--seed", "2"]) == 0
    assert "class Program" in capsys.readouterr().out
