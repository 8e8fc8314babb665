"""The switches that `make comparison` compares: each does what its row says, and some change the result."""

from dataclasses import replace

import pytest
import torch

from fxstream.tools.bench import relative_l2
from fxstream.tools.comparison import CASES, SWITCHES
from fxstream.tools.measure import measure_peak

SHAPES = {
    "svd-unet": {"frames": 4, "height": 8, "width": 16, "batch": 2},
    "modelscope-unet": {"frames": 2, "height": 8, "width": 8, "batch": 1},
    "svd-vae": {"frames": 5, "height": 4, "width": 4, "batch": 1},
    "sd-vae": {"frames": 2, "height": 4, "width": 40, "batch": 1},  # a tile is 32 wide
}
CHANGES = {"chunks of 4 frames", "single frames", "tiling"}
"""Switches with another result than to rounding."""

SAVES = {
    "forward chunking, dim 0",
    "forward chunking, dim 1",
    "chunks of 4 frames",
    "single frames",
    "slicing",
    "tiling",
}


@pytest.mark.parametrize(
    ("case", "switch"),
    [(case, switch) for case in CASES for switch in case.switches],
    ids=lambda x: getattr(x, "name", x),
)
@torch.no_grad()
def test_switch(case, switch):
    case = replace(case, shape=SHAPES[case.name])
    model, args, kwargs = case.build()
    whole = measure_peak(model, *args, **kwargs)
    model, args, kwargs = case.build()
    switched = measure_peak(SWITCHES[switch](model), *args, **kwargs)
    distance = relative_l2(switched.result[0], whole.result[0])
    assert (distance > 1e-3) == (switch in CHANGES), distance
    assert (switched.peak_bytes < whole.peak_bytes) == (switch in SAVES)


def test_every_switch_is_compared():
    assert {switch for case in CASES for switch in case.switches} == set(SWITCHES)
