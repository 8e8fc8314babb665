"""Pipelines with their weights on disk: a stage holds what its plan says, and nothing of the other components."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxstream
from fxstream.module import StreamedModule
from fxstream.pipeline.components import modules_of, weights_of
from fxstream.runtime.files import region_of
from fxstream.tools.measure import measure_peak
from tests.fxstream.pipeline.pipelines import PIPELINES, TextEncoder, toy


def generate(pipeline, **changes):
    return pipeline("a cat", **{"generator": torch.Generator().manual_seed(2), **changes})


def distance(found, expected):
    return (found.double() - expected.double()).norm() / expected.double().norm()


def at_home(pipeline):
    return [region_of(weight) is not None for module in modules_of(pipeline).values() for weight in weights_of(module)]


@pytest.fixture
def pipeline():
    return toy()


@pytest.fixture
def expected():
    return generate(toy())


@pytest.mark.parametrize("name", ["svd", "wan"])
def test_pipelines_of_diffusers(name):
    torch.manual_seed(0)
    made, call = PIPELINES[name]()
    made.set_progress_bar_config(disable=True)

    def pixels():
        torch.manual_seed(3)
        output = made(**call, num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(2))
        return output["frames"]

    expected = pixels()
    weights = sum(weight.nbytes for module in modules_of(made).values() for weight in weights_of(module))
    fxstream.optimize(made, "min", offload="disk", **call)
    planned = fxstream.plan(made)
    assert distance(pixels(), expected) <= 1e-5
    assert fxstream.plan(made).stages == planned.stages
    assert all(at_home(made))
    # One whose peak holds nearly all of its weights, as kernels that copy their input make of an encoder, fetches none.
    assert sum(bool(stage.plan.fetched) for stage in planned.stages) >= len(planned.stages) - 1
    for stage in planned.stages:
        assert stage.streamed
        assert stage.resident.weight_bytes == stage.plan.after.weight_bytes < weights / 2
        assert stage.total_bytes == stage.plan.after.weight_bytes + stage.plan.input_bytes + (
            stage.plan.peak_bytes + stage.resident.other_bytes
        )


class TestStages:
    def test_all_components_are_stages(self, pipeline, expected):
        fxstream.optimize(pipeline, "min", offload="disk", height=16)
        assert distance(generate(pipeline), expected) <= 1e-6
        encoder, *_ = fxstream.plan(pipeline).stages
        assert (encoder.name, encoder.streamed) == ("text_encoder", True)
        assert encoder.plan.before.weight_bytes == 256 * 16 * 4
        assert encoder.total_bytes == encoder.plan.input_bytes + encoder.plan.moved_bytes == 8 + 64
        header, _, row, *_ = str(fxstream.plan(pipeline)).splitlines()
        assert (header.split()[-1], row.split()[-2:]) == ("moved", ["64", "B"])

    def test_planned_at_the_first_call(self, pipeline, expected):
        fxstream.optimize(pipeline, "64KiB", offload="disk")
        assert all(at_home(pipeline))
        assert distance(generate(pipeline), expected) <= 1e-6
        stages = fxstream.plan(pipeline).stages
        assert [stage.name for stage in stages] == ["text_encoder", "denoiser", "codec.decode"]
        assert all(stage.fits for stage in stages)

    def test_what_a_stage_holds(self, pipeline):
        """Its fetched weights and activations, by the allocator's events; of its other weights what it has mapped."""
        fxstream.optimize(pipeline, "min", offload="disk", num_frames=8)
        generate(pipeline, num_frames=8)
        latents, prompt = torch.randn(8, 4, 8, 12), torch.randn(1, 6, 16)
        (_, stage, *_) = fxstream.plan(pipeline).stages
        with torch.no_grad():
            measured = measure_peak(pipeline.denoiser, latents, torch.tensor(5), prompt_embeds=prompt)
        assert measured.peak_bytes <= 1.01 * stage.plan.peak_bytes

    def test_planning_changes_nothing(self, pipeline):
        planned = fxstream.plan(pipeline, memory_budget="min", offload="disk", height=16)
        assert planned.stages[0].plan.fetched
        assert not any(at_home(pipeline))

    def test_below_the_lowest_nothing_is_changed(self, pipeline):
        with pytest.raises(
            fxstream.MemoryBudgetError, match="Beside its weights and activations the pipeline"
        ) as caught:
            fxstream.optimize(pipeline, "48KiB", offload="disk", height=16)
        assert caught.value.stage == "codec.decode"
        assert not any(at_home(pipeline))
        assert not isinstance(pipeline.codec, StreamedModule)

    def test_without_it_the_error_says_that_it_could(self, pipeline):
        with pytest.raises(fxstream.MemoryBudgetError, match='offload="disk"'):
            fxstream.optimize(pipeline, "16KiB", height=16)

    def test_a_full_disk_leaves_the_pipeline_alone(self, pipeline, expected, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="can't be spilled"):
            fxstream.optimize(pipeline, "min", offload="disk", height=16)
        assert not any(at_home(pipeline))
        assert torch.equal(generate(pipeline), expected)

    def test_restored(self, pipeline, expected):
        before = modules_of(pipeline)
        fxstream.optimize(pipeline, "min", offload="disk")
        fxstream.restore(pipeline)
        assert all(pipeline.components[name] is module for name, module in before.items())
        assert torch.equal(generate(pipeline), expected)

    def test_step_rehash_is_refused(self, pipeline):
        rehash = fxstream.StepRehash(key_steps=[0], cut="up")
        with pytest.raises(ValueError, match="Step Rehash"):
            fxstream.optimize(pipeline, "min", offload="disk", step_rehash=rehash)


class Counting(TextEncoder):
    """What can't be captured: what it does depends on the numbers that it is given."""

    def forward(self, numbers):
        found = super().forward(numbers)
        return found if found.sum() > 1e6 else found + 0.0


def test_what_cant_be_captured_runs_whole(pipeline):
    torch.manual_seed(0)
    pipeline.text_encoder = Counting().eval()
    expected = generate(pipeline)
    fxstream.optimize(pipeline, "min", offload="disk", height=16)
    assert distance(generate(pipeline), expected) <= 1e-6
    encoder, denoiser, _ = (stage for stage in fxstream.plan(pipeline).stages if stage.calls is not None)
    assert (encoder.streamed, encoder.plan, denoiser.streamed) == (False, None, True)
    assert encoder.resident.weights == {"text_encoder": 256 * 16 * 4}
    assert "text_encoder" not in denoiser.resident.weights


class TestWeights:
    def test_what_something_else_holds_stays_and_counts(self, pipeline):
        held = pipeline.text_encoder.table.weight.data[3]
        fxstream.optimize(pipeline, "min", offload="disk", height=16)
        stages = fxstream.plan(pipeline).stages
        assert [stage.resident.weights["text_encoder"] for stage in stages] == [256 * 16 * 4] * 3
        pipeline.text_encoder.table.weight.data.fill_(2.0)
        assert (held == 2.0).all()

    def test_new_ones_go_home_when_a_stage_begins(self, pipeline):
        fxstream.optimize(pipeline, "min", offload="disk")
        generate(pipeline)
        torch.manual_seed(5)
        replaced = nn.Linear(4, 32)
        modules_of(pipeline)["denoiser"].up = replaced
        found = generate(pipeline)
        assert all(at_home(pipeline))
        fxstream.restore(pipeline)
        assert pipeline.denoiser.up is replaced
        assert distance(found, generate(pipeline)) <= 1e-6

    def test_shared_ones_stay_shared(self, pipeline):
        pipeline.codec.rise.bias = pipeline.denoiser.up.bias
        fxstream.optimize(pipeline, "min", offload="disk")
        generate(pipeline)
        assert pipeline.codec.rise.bias is modules_of(pipeline)["denoiser"].up.bias
        assert all(at_home(pipeline))

    def test_those_without_memory_are_planned(self, pipeline):
        fxstream.optimize(pipeline, "min", offload="disk")
        modules_of(pipeline)["denoiser"].to("meta")
        assert fxstream.plan(pipeline, offload="disk", height=16).stages


class TestHooks:
    """``offload`` takes over a pipeline on which ``enable_model_cpu_offload`` was called."""

    def test_taken_over_and_given_back(self, pipeline, expected):
        pipeline.enable_model_cpu_offload(device="cpu")
        fxstream.optimize(pipeline, "min", offload="disk", height=16)
        assert not any("_hf_hook" in vars(module) for module in modules_of(pipeline).values())
        assert distance(generate(pipeline), expected) <= 1e-6
        fxstream.restore(pipeline)
        assert all("_hf_hook" in vars(module) for module in modules_of(pipeline).values())
        assert torch.equal(generate(pipeline), expected)

    def test_an_error_leaves_them(self, pipeline):
        pipeline.enable_model_cpu_offload(device="cpu")
        with pytest.raises(fxstream.MemoryBudgetError):
            fxstream.optimize(pipeline, "1KiB", offload="disk", height=16)
        assert all("_hf_hook" in vars(module) for module in modules_of(pipeline).values())

    def test_by_layers_is_refused_with_the_remedy(self, pipeline):
        pipeline.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(ValueError, match='offload="disk"'):
            fxstream.optimize(pipeline, "min")


RESIDENT = """
import gc, resource, sys, torch
from torch import nn
from diffusers import DDIMScheduler
import fxstream
from tests.fxstream.pipeline.pipelines import Codec, TextEncoder, ToyPipeline, Denoiser, toy

class Encoder(TextEncoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048) for _ in range(8))
    def forward(self, numbers):
        x = super().forward(numbers).repeat(1, 1, 128)
        for layer in self.layers:
            x = x + layer(x)
        return x[..., :16]

class Wide(Denoiser):
    def __init__(self):
        super().__init__(width=4)
        self.layers = nn.ModuleList(nn.Linear(4096, 2048) if i % 2 else nn.Linear(2048, 4096) for i in range(4))
    def forward(self, hidden_states, timestep, prompt_embeds, return_dict=False):
        x = prompt_embeds.repeat(1, 1, 128)
        for layer in self.layers:
            x = layer(x)
        return super().forward(hidden_states, timestep, x[..., :16])

def pipeline():
    torch.manual_seed(0)
    made = ToyPipeline(Encoder().eval(), Wide().eval(), Codec().eval(), DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def generate(pipeline):
    return pipeline("a cat", generator=torch.Generator().manual_seed(2))

warm = toy()
fxstream.optimize(warm, "min", offload="disk")  # which brings modules in that planning takes
generate(warm)
made = pipeline()
expected = generate(made)
weights = sum(w.nbytes for m in made.components.values() if isinstance(m, nn.Module) for w in m.parameters())
before = now()
fxstream.optimize(made, "48MiB", offload="disk:" + sys.argv[1])
generate(made)
gc.collect()
after = now()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark begins anew
found = generate(made)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
off = float((found - expected).norm() / expected.norm())
stages = fxstream.plan(made).stages
print(weights, before - after, peak - after, max(stage.total_bytes for stage in stages), off)
"""


def test_resident_memory_of_a_process_of_its_own(tmp_path):
    """256 MiB of weights in memory go to disk; a generation holds what the stage that holds most is planned to."""
    command = [sys.executable, "-c", RESIDENT, str(tmp_path)]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is the system's at once
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=given_back)
    weights, freed, grown, planned, off = map(float, done.stdout.split())
    assert off <= 1e-6
    assert weights > 256 << 20
    assert freed > 0.8 * weights
    assert planned <= 48 << 20
    assert grown <= planned + (8 << 20)
