import json

import pytest

from fxstream.tools.cli import main
from fxstream.tools.compare import differing_loops, summary
from fxstream.tools.document import to_json
from tests.tools.test_cli import one_line

NESTED, FEEDFORWARD = "tests.tools.targets:nested", "tests.tools.targets:feedforward"


@pytest.fixture
def saved(nested, tmp_path):
    path = tmp_path / "nested.json"
    path.write_text(to_json(nested.found))
    return str(path)


def test_a_plan_and_itself(saved, nested, capsys):
    assert main(["compare", saved, saved, "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "The loops are the same." in out
    assert all(row[2] in (1, None) for row in summary(nested.found, nested.found).values() if len(row) == 3)


def test_a_saved_plan_and_a_target(saved, nested, capsys):
    assert main(["compare", saved, NESTED, "--quiet", "--budget", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = found["summary"]["activation peak before"], found["summary"]["activation peak after"]
    assert before[0] == before[1] == nested.compiled.plan.before.peak_bytes
    assert after[0] == nested.compiled.plan.after.peak_bytes < after[1] <= 0.9 * before[1]
    assert found["summary"]["loops"][0] == len(nested.compiled.plan.groups)
    assert found["loops"]


def test_loops_that_differ(nested):
    other = {**nested.found, "groups": [{**nested.found["groups"][0], "slices": 7}, *nested.found["groups"][2:]]}
    changed, gone = differing_loops(nested.found, other)
    assert (changed["first"]["slices"], changed["second"]["slices"]) == (nested.found["groups"][0]["slices"], 7)
    assert gone["second"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ('{"format": "fxstream plan 0"}', "inspect it again"), ("{}", "_class_name")],
)
def test_files_that_are_no_plans(capsys, tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert main(["compare", str(path), FEEDFORWARD, "--quiet"]) == 2
    assert message in one_line(capsys)
