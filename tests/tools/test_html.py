"""The page, in a real browser."""

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

from fxstream.budget import format_bytes
from fxstream.tools.browser import browser
from fxstream.tools.html import to_html

MANY = 6000
"""Nodes of a large page."""


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("playwright", reason="SKIPPED FOR WANT OF A BROWSER: playwright is not installed")
    try:
        with browser() as found:
            yield found
    except FileNotFoundError as error:
        pytest.skip(f"SKIPPED FOR WANT OF A BROWSER: {error}")


@dataclass
class Opened:
    """A page in a browser, and what it complained of or asked the network for."""

    page: Any
    complaints: list[str]
    requests: list[str]

    def text(self, selector):
        return self.page.inner_text(selector)

    def cells(self, table):
        rows = self.page.query_selector_all(f"{table} tbody tr")
        return [[cell.inner_text() for cell in row.query_selector_all("td")] for row in rows]

    def over(self, chart, node):
        """Moves the mouse over a node of a chart."""
        x = self.page.evaluate(
            "([name, node]) => { const chart = charts.find(c => c.profile.name === name), plot = chart.plot();"
            " return plot.left + (node + 0.5 - chart.first) / chart.shown() * plot.width; }",
            [chart, node],
        )
        box = self.page.locator(f"#{chart}").bounding_box()
        self.page.mouse.move(box["x"] + x, box["y"] + 40)

    def shown(self, chart):
        """The nodes that a chart shows, from and to."""
        return self.page.evaluate(
            "name => { const chart = charts.find(c => c.profile.name === name); return [chart.first, chart.last]; }",
            chart,
        )


def opened_in(chromium, path, **options):
    page = chromium.new_page(viewport={"width": 1200, "height": 1400}, **options)
    opened = Opened(page, [], [])
    page.on("console", lambda message: opened.complaints.append(message.text))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(path.as_uri())
    return opened


@pytest.fixture(scope="module")
def path(nested, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "nested.html"
    file.write_text(to_html(nested.found), encoding="utf-8")
    return file


@pytest.fixture
def opened(chromium, path):
    opened = opened_in(chromium, path)
    yield opened
    opened.page.close()
    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]  # no network


def test_the_numbers_are_those_of_the_json(opened, nested):
    found = nested.found
    held = found["weight_bytes"] + found["input_bytes"]
    before, after = (found[which]["peak_bytes"] for which in ("before", "after"))
    rows = [
        [name, *map(format_bytes, sizes)]
        for name, *sizes in (
            ("activation peak", before, after),
            ("weights", found["weight_bytes"], found["weight_bytes"]),
            ("inputs", found["input_bytes"], found["input_bytes"]),
            ("all", before + held, after + held),
        )
    ]
    assert opened.cells("#summary") == rows
    assert opened.text("#fits").startswith(found["fits"])
    assert ("GFLOP" in opened.text("#fits")) == bool(found["added_flops"])
    assert [row[0] for row in opened.cells("#measured")] == ["eager", "captured", "streamed"]
    assert opened.page.title() == "nested - fxstream"


def test_at_first_the_peak_after_is_shown(opened, nested):
    profile = nested.found["after"]
    assert opened.text("#where") == profile["nodes"][profile["peak_index"]]["name"]
    assert opened.page.get_attribute("#where", "data-bytes") == str(profile["peak_bytes"])


@pytest.mark.parametrize("which", ["before", "after"])
def test_hovering_tells_the_node_and_what_is_live(opened, nested, which):
    profile = nested.found[which]
    for node in (0, profile["peak_index"], len(profile["nodes"]) - 1):
        opened.over(which, node)
        expected = profile["nodes"][node]
        tip = opened.text("#tip").splitlines()
        assert tip[0] == expected["name"]
        assert tip[1] == (expected["module"] or "the model itself")
        assert f"({expected['live_bytes']:,} bytes)" in tip[2]
        rows = opened.cells("#live")
        live = [t for t in profile["tensors"] if t["birth"] <= node <= t["death"]]
        inside = expected["live_bytes"] - sum(tensor["bytes"] for tensor in live)
        named = [row for row in rows if not row[3].startswith("inside ")]
        assert sorted(row[3] for row in named) == sorted(tensor["node"] for tensor in live)
        assert sorted(row[0] for row in named) == sorted(format_bytes(tensor["bytes"]) for tensor in live)
        assert [row[0] for row in rows if row[3].startswith("inside ")] == ([format_bytes(inside)] if inside else [])


def test_hovering_names_the_loops_around_a_node(opened, nested):
    outer = nested.compiled.plan.groups[0]
    nodes = [node["name"] for node in nested.found["after"]["nodes"]]
    opened.over("after", next(i for i, name in enumerate(nodes) if name.startswith(f"{outer.name}/")))
    assert f"{outer.name}, {outer.slices} slices" in opened.text("#tip")


def test_a_click_keeps_a_point(opened, nested):
    opened.over("before", 3)
    opened.page.mouse.down()
    opened.page.mouse.up()
    opened.page.mouse.move(5, 5)
    assert opened.text("#where") == nested.found["before"]["nodes"][3]["name"]
    assert opened.page.locator("#tip").is_hidden()


def test_the_wheel_zooms_about_the_pointer(opened, nested):
    total = len(nested.found["before"]["nodes"])
    assert opened.shown("before") == [0, total]
    opened.over("before", total // 3)
    for _ in range(3):
        opened.page.mouse.wheel(0, -200)
    opened.page.wait_for_function("() => charts[0].shown() < charts[0].total / 2")
    first, last = opened.shown("before")
    assert first < total // 3 < last
    assert f"of {total} operators shown" in opened.text("#before-view")
    assert opened.shown("after") == [0, len(nested.found["after"]["nodes"])]
    assert opened.page.evaluate("scrollY") == 0
    opened.page.dblclick("#before")
    assert opened.shown("before") == [0, total]


def test_dragging_zooms_to_the_part(opened):
    opened.over("before", 5)
    opened.page.mouse.down()
    opened.over("before", 20)
    opened.page.mouse.up()
    first, last = opened.shown("before")
    assert 4 <= first <= 6 and 20 <= last <= 22


def test_the_keyboard_does_what_the_mouse_does(opened, nested):
    nodes = [node["name"] for node in nested.found["after"]["nodes"]]
    peak = nested.found["after"]["peak_index"]
    opened.page.focus("#after")
    opened.page.keyboard.press("ArrowLeft")
    assert opened.text("#where") == nodes[peak - 1]
    opened.page.keyboard.press("+")
    first, last = opened.shown("after")
    assert last - first < len(nodes)
    opened.page.keyboard.press("0")
    assert opened.shown("after") == [0, len(nodes)]


def test_loops_open_to_their_bodies(opened, nested):
    groups = opened.page.query_selector_all("#groups details")
    assert [group.get_attribute("data-name") for group in groups] == [g["name"] for g in nested.found["groups"]]
    for group, expected in list(zip(groups, nested.found["groups"], strict=True))[:3]:
        assert group.query_selector("pre") is None  # made when it is opened
        group.query_selector("summary").click()
        opened.page.wait_for_function("group => group.querySelector('pre')", arg=group)
        assert group.query_selector("pre").text_content() == expected["code"]
        assert f"{expected['slices']} slices" in group.query_selector("summary").inner_text()


def test_light_and_dark(chromium, path):
    papers = []
    for scheme in ("light", "dark"):
        opened = opened_in(chromium, path, color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        papers.append(opened.page.evaluate(f"[{style}.color, {style}.backgroundColor]"))
        opened.page.close()
    (ink, paper), (dark_ink, dark_paper) = ([sum(map(int, re.findall(r"\d+", c)[:3])) for c in pair] for pair in papers)
    assert paper - ink > 500 and dark_ink - dark_paper > 500


def large(found):
    """The same document with thousands of nodes, the tensors of each stretch its own."""
    made = json.loads(json.dumps(found))
    for which in ("before", "after"):
        profile = made[which]
        count = len(profile["nodes"])
        copies = MANY // count + 1
        profile["nodes"] = [
            {**node, "name": f"{node['name']}_{copy}"} for copy in range(copies) for node in profile["nodes"]
        ]
        profile["tensors"] = [
            {**tensor, "birth": tensor["birth"] + copy * count, "death": tensor["death"] + copy * count}
            for copy in range(copies)
            for tensor in profile["tensors"]
        ]
    return made


def test_a_page_of_thousands_of_nodes_is_small_and_answers(chromium, nested, tmp_path):
    found = large(nested.found)
    file = tmp_path / "large.html"
    file.write_text(to_html(found), encoding="utf-8")
    assert file.stat().st_size < 3_000_000
    opened = opened_in(chromium, file)
    assert opened.page.evaluate("charts[0].total") >= MANY
    opened.page.evaluate("charts[0].show(5000, 5020)")
    opened.over("before", 5010)
    assert opened.text("#where") == found["before"]["nodes"][5010]["name"]
    opened.page.close()
    assert opened.complaints == []


def test_text_of_the_model_is_no_markup(chromium, nested, tmp_path):
    found = {**nested.found, "target": "</script><b id=broken>&amp;"}
    file = tmp_path / "odd.html"
    file.write_text(to_html(found), encoding="utf-8")
    opened = opened_in(chromium, file)
    assert opened.text("#title") == found["target"]
    assert opened.page.query_selector("#broken") is None
    opened.page.close()
    assert opened.complaints == []
