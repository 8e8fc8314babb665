"""What is shown of a plan: a line, a screen, a picture."""

from xml.etree import ElementTree

import torch
from torch import nn

import fxstream
from fxstream.notebook import timeline
from fxstream.report import SHOWN_GROUPS


class Blocks(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(torch.relu(torch.cat([block(x)] * 8, dim=1)).unflatten(1, (8, 4)).sum(1))
        return x


def planned(count=1):
    return fxstream.plan(Blocks(count), (torch.randn(1, 4, 32, 32),), memory_budget="min")


def test_a_plan_is_a_line_a_screen_and_a_picture():
    plan = planned()
    assert "\n" not in repr(plan) and len(repr(plan)) < 160 and str(len(plan.groups)) in repr(plan)
    html = plan._repr_html_()
    picture = ElementTree.fromstring(html[: html.index("</svg>") + len("</svg>")])
    assert len(picture.findall("{*}polygon")) == 2
    assert "activation peak" in html and "Planned for" in html


def test_of_many_loops_those_that_lower_memory_most_are_shown():
    plan = planned(SHOWN_GROUPS + 4)
    assert len(plan.groups) > SHOWN_GROUPS
    assert len(str(plan).splitlines()) < 60 < len(plan.groups_table().splitlines()) + 40
    assert "print(plan.groups_table())" in str(plan)


def test_long_schedules_keep_their_peaks():
    live = [1] * 5000
    live[3217] = 1000
    picture = ElementTree.fromstring(timeline({"before": live, "after": live[:10]}))
    heights = [float(point.split(",")[1]) for point in picture.find("{*}polygon").get("points").split()]
    assert min(heights) == 20.0 and len(heights) < 1000
