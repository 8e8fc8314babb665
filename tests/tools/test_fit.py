import csv
import io
import json
from itertools import pairwise

import pytest

from fxstream.tools.cli import main
from fxstream.tools.fit import Probe, largest
from tests.tools.test_cli import one_line

FEEDFORWARD = "tests.tools.targets:feedforward"


def searched(total, memory, first=14, most=1000):
    """The search over frames where ``total(frames)`` bytes are needed; None is a refusal."""
    asked = []

    def probe(number):
        asked.append(number)
        return Probe({"frames": number}, 10, total(number), "" if total(number) is not None else "no")

    best, tried = largest(probe, lambda number: number, memory, first, most)
    assert [probe.size["frames"] for probe in tried] == asked
    assert len({*asked}) == len(asked)
    return best, asked


@pytest.mark.parametrize("best", [1, 2, 13, 14, 15, 97, 999, 1000])
def test_the_largest_is_found_in_a_few_tries(best):
    found, asked = searched(lambda n: 10 + 7 * n, 10 + 7 * best)
    assert found == best
    assert len(asked) <= 4


def test_memory_that_does_not_grow_in_a_line():
    def total(n):
        return 10 + 5 * n + n * n // 30 + 40 * (n > 200)

    for memory in (50, 700, 1500, 5000):
        found, asked = searched(total, memory)
        assert total(found) <= memory < total(found + 1)
        assert len(asked) <= 12


def test_sizes_that_are_refused():
    found, asked = searched(lambda n: 10 + 7 * n if n <= 32 else None, 10 + 7 * 100)
    assert found == 32
    assert len(asked) <= 14


def test_nothing_fits_or_all_does():
    assert searched(lambda n: 10 + 7 * n, 16)[0] == 0
    assert searched(lambda n: 10 + 7 * n, 10**9) == (1000, [14, 1000])


def test_the_most_frames_of_a_function(capsys):
    assert main(["fit", FEEDFORWARD, "--memory", "64KiB", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["largest"]["frames"]
    told = {probe["frames"]: probe["total_bytes"] for probe in found["tried"]}
    assert told[best] <= 64 * 1024 < told[best + 1]


def test_a_function_that_refuses(capsys):
    assert main(["fit", "tests.tools.targets:at_most_100", "--memory", "1GiB", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "in 1.00 GiB: 100 frames." in out
    assert "more than 100 frames" in out


def test_a_memory_that_is_too_small(capsys):
    assert main(["fit", FEEDFORWARD, "--memory", "1KiB", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nothing fits 1.00 KiB: the smallest size tried needs 3" in err


def test_a_function_without_frames(capsys):
    assert main(["fit", "tests.tools.targets:nested", "--memory", "1GiB", "--quiet"]) == 2
    assert "takes no argument for --frames" in one_line(capsys)


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """The curve of a model whose function takes all sizes."""
    path = tmp_path_factory.mktemp("fit")
    sizes = "--frames 3 --height 64 --width 64 --quiet --measure --memory 100KiB"
    files = f"--json {path / 'curve.json'} --csv {path / 'curve.csv'} --svg {path / 'curve.svg'}"
    assert main(["fit", "tests.tools.targets:sized", *sizes.split(), *files.split()]) == 0
    return path


def test_the_curve(curve):
    points = json.loads((curve / "curve.json").read_text())["budgets"]
    assert len(points) >= 3
    assert points[-1]["loops"] == 0 and points[-1]["estimated_ratio"] == points[-1]["measured_ratio"] == 1
    assert all(point["loops"] for point in points[:-1])
    assert all(a["peak_bytes"] < b["peak_bytes"] for a, b in pairwise(points))
    for point in points:
        assert point["measured_bytes"] == pytest.approx(point["peak_bytes"], rel=0.01, abs=2048)
        assert point["estimated_seconds"] > 0 and point["measured_seconds"] > 0
    rows = list(csv.DictReader(io.StringIO((curve / "curve.csv").read_text())))
    assert [int(row["peak_bytes"]) for row in rows] == [point["peak_bytes"] for point in points]


def test_the_curve_as_a_picture(curve):
    pytest.importorskip("matplotlib")
    assert "<!-- measured -->" in (curve / "curve.svg").read_text()
