import re

import pytest

from fxstream.budget import format_bytes
from fxstream.tools import picture
from fxstream.tools.errors import UsageError

pytest.importorskip("matplotlib")

POINTS = [
    {"total_bytes": size, "estimated_ratio": ratio, "measured_ratio": None}
    for size, ratio in ((2**30, 1.5), (2**31, 1.1), (2**32, 1.0))
]


def test_the_timeline_says_both_peaks(nested):
    svg = picture.timeline(nested.found, "svg").decode()
    for which in ("before", "after"):
        assert f"<!-- {format_bytes(nested.found[which]['peak_bytes'])} at " in svg
    assert picture.BEFORE in svg and picture.AFTER in svg


def test_a_bar_for_each_part_of_a_loop(nested):
    svg = picture.timeline(nested.found, "svg").decode()
    groups = nested.found["groups"]
    assert len(re.findall(f"fill: {picture.GROUP}", svg)) == len(groups) + sum(len(group["spans"]) for group in groups)


def test_png(nested):
    assert picture.timeline(nested.found, "png").startswith(b"\x89PNG")


def test_the_same_plan_gives_the_same_picture(nested):
    assert picture.timeline(nested.found, "png") == picture.timeline(nested.found, "png")


def test_a_curve_shows_what_was_measured():
    assert "measured" not in picture.curve(POINTS, "a model", "svg").decode().replace("estimated", "")
    measured = [{**point, "measured_ratio": 1.2} for point in POINTS]
    assert "<!-- measured -->" in picture.curve(measured, "a model", "svg").decode()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'fxstream\[plot\]'"):
        picture.check_available()
