"""What a plan of a pipeline prints and adds up."""

import pytest

import fxstream
from fxstream.pipeline.plan import PipelinePlan
from tests.fxstream.pipeline.pipelines import toy


@pytest.fixture(scope="module")
def plan():
    return fxstream.plan(toy(), memory_budget="160KiB", num_frames=4)


def test_sums(plan):
    for stage in plan.stages:
        made = stage.plan
        assert stage.total_bytes == stage.resident.bytes + made.input_bytes + made.after.peak_bytes
        assert stage.fits
    assert plan.peak_bytes == max(stage.total_bytes for stage in plan.stages) <= 160 * 1024


def test_a_line_a_stage(plan):
    lines = plan.table().splitlines()
    assert lines[0].split() == [
        "stage",
        "calls",
        "weights",
        "inputs",
        "kept",
        "before",
        "after",
        "all",
        "fits",
        "streamed",
    ]
    assert [line.split()[0] for line in lines[2:]] == ["text_encoder", "denoiser", "codec.decode"]
    assert all(line.split()[-2] == "yes" for line in lines[2:])
    assert plan.table() in str(plan)


def test_weights(plan):
    lines = plan.weights_table().splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["text_encoder", "16.00", "KiB", "all"],
        ["denoiser", "1.14", "KiB", "all"],
        ["codec", "5.01", "KiB", "all"],
    ]


def test_without_stages():
    assert PipelinePlan(()).peak_bytes == 0
    assert "No stage has been planned yet" in str(PipelinePlan(()))
