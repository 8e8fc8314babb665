"""Offloading: who shares the device, and hooks that stay with the pipeline."""

import pytest
import torch

import fxstream
from fxstream.pipeline.components import modules_of
from fxstream.pipeline.offload import Device, hooks_removed, offloaded
from tests.fxstream.pipeline.pipelines import toy


@pytest.fixture
def pipeline():
    made = toy()
    made.enable_model_cpu_offload(device="cpu")
    return made


def generate(pipeline):
    return pipeline("a cat", generator=torch.Generator().manual_seed(0))


def test_the_chain(pipeline):
    assert offloaded(toy()) == {}
    assert offloaded(pipeline) == {"text_encoder": None, "denoiser": "text_encoder", "codec": "denoiser"}
    assert offloaded(fxstream.optimize(pipeline, "min")) == offloaded(pipeline)


def test_who_is_on_the_device():
    device = Device(["a", "b", "c", "kept"], {"a": None, "b": "a", "c": "b"})
    seen = []
    for name in ("a", "c", "b", "b", "c", "a"):
        device.enters(name)
        seen.append(set(device.there) - {"kept"})
    assert seen == [{"a"}, {"a", "c"}, {"b", "c"}, {"b", "c"}, {"c"}, {"a", "c"}]
    assert "kept" in device.there


def test_a_stage_holds_its_own_weights(pipeline):
    stages = fxstream.plan(pipeline).stages
    assert [list(stage.resident.weights) for stage in stages] == [["text_encoder"], ["denoiser"], ["codec"]]


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_and_stay(when):
    pipeline = toy()
    expected = generate(pipeline)
    if when == "before":
        pipeline.enable_model_cpu_offload(device="cpu")
    fxstream.optimize(pipeline, "min", height=16)
    if when == "after":
        pipeline.enable_model_cpu_offload(device="cpu")
    calls = []
    hook = pipeline.codec._hf_hook
    run = hook.pre_forward
    hook.pre_forward = lambda module, *args: calls.append(module) or run(module, *args)
    for _ in range(2):  # the hooks are made anew after each generation
        assert (generate(pipeline) - expected).norm() <= 1e-6 * expected.norm()
    assert calls == [pipeline.codec]
    assert all(stage.calls is not None for stage in fxstream.plan(pipeline).stages)
    fxstream.restore(pipeline)
    assert offloaded(pipeline) == {"text_encoder": None, "denoiser": "text_encoder", "codec": "denoiser"}
    assert torch.equal(generate(pipeline), expected)


def test_an_error_leaves_the_hooks(pipeline):
    with pytest.raises(fxstream.MemoryBudgetError):
        fxstream.optimize(pipeline, "16KiB", height=16)
    assert list(offloaded(pipeline)) == ["text_encoder", "denoiser", "codec"]
    with hooks_removed(pipeline):
        assert offloaded(pipeline) == {}
    assert list(offloaded(pipeline)) == ["text_encoder", "denoiser", "codec"]


def test_weights_that_come_a_part_at_a_time_are_refused():
    pipeline = toy()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    before = modules_of(pipeline)
    for call in ({}, {"height": 16}):
        with pytest.raises(ValueError, match="weights of text_encoder come to the device a part at a time"):
            fxstream.optimize(pipeline, "min", **call)
    assert modules_of(pipeline) == before
    pipeline = toy()
    pipeline.denoiser.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
    )
    with pytest.raises(ValueError, match="weights of denoiser"):
        fxstream.plan(pipeline)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_stages_are_planned_for_the_device_that_weights_come_to():
    """A card that need not be here; and nothing of the pipeline's is on it afterwards."""
    pipeline = toy()
    pipeline.enable_model_cpu_offload(device="cuda")
    stages = fxstream.plan(pipeline, height=16).stages
    assert [stage.name for stage in stages] == ["text_encoder", "denoiser", "codec.decode"]
    assert all("CUDA card" in stage.plan.machine for stage in stages)
    assert all(stage.plan.reserve is not None for stage in stages)
    assert {x.device.type for module in modules_of(pipeline).values() for x in module.parameters()} == {"cpu"}
    here = fxstream.plan(toy(), height=16).stages
    assert all("CUDA" not in stage.plan.machine for stage in here)
