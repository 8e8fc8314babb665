"""Whole pipelines: every stage within the budget, the same result, and everything as it was after ``restore``."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxstream
from fxstream.module import StreamedModule
from fxstream.pipeline.components import modules_of
from fxstream.tools.measure import measure_peak
from tests.fxstream.pipeline.pipelines import PIPELINES, Codec, Denoiser, TextEncoder, toy

STAGES = {
    "svd": ["image_encoder", "vae.encode", "unet", "vae.decode"],
    "animatediff": ["unet", "vae.decode"],
    "modelscope": ["unet", "vae.decode"],
    "i2vgenxl": ["image_encoder", "vae.encode", "unet", "vae.decode"],
    "stable-diffusion": ["unet", "vae.decode"],
    "wan": ["transformer", "vae.decode"],
}


def distance(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert expected.isfinite().all() and expected.std() > 0.01
    return (found.double() - expected.double()).norm() / expected.double().norm()


def seeded(seed=2):
    return torch.Generator().manual_seed(seed)


class Case:
    """A pipeline of diffusers, what it makes by itself, and the same streamed."""

    def __init__(self, name):
        torch.manual_seed(0)
        self.pipeline, self.call = PIPELINES[name]()
        self.pipeline.set_progress_bar_config(disable=True)
        self.modules = modules_of(self.pipeline)
        self.expected = self.generate()
        assert fxstream.optimize(self.pipeline, "min", **self.call) is self.pipeline
        self.plan = fxstream.plan(self.pipeline)
        self.found = self.generate()

    def generate(self):
        torch.manual_seed(3)  # what some pipelines draw from when they encode an image
        output = self.pipeline(**self.call, num_inference_steps=2, output_type="pt", generator=seeded())
        return output["images" if "images" in output else "frames"]


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    return request.param, Case(request.param)


class TestPublished:
    def test_every_stage_is_planned_and_lower(self, case):
        name, made = case
        assert [stage.name for stage in made.plan.stages] == STAGES[name]
        weights = sum(x.nbytes for module in made.modules.values() for x in (*module.parameters(), *module.buffers()))
        for stage in made.plan.stages:
            assert stage.resident.weight_bytes == weights
            assert stage.total_bytes > weights + stage.plan.after.peak_bytes
            if stage.streamed:
                assert stage.plan.groups
                assert stage.plan.after.peak_bytes < stage.plan.before.peak_bytes

    def test_the_same_pixels_by_the_plans_made_at_once(self, case):
        _, made = case
        assert distance(made.found, made.expected) <= 1e-5
        assert fxstream.plan(made.pipeline).stages == made.plan.stages

    def test_restored(self, case):
        _, made = case
        assert any(isinstance(part, StreamedModule) for part in made.pipeline.components.values())
        assert fxstream.restore(made.pipeline) is made.pipeline
        assert all(made.pipeline.components[name] is module for name, module in made.modules.items())
        assert torch.equal(made.generate(), made.expected)


@pytest.fixture
def pipeline():
    return toy()


def generate(pipeline, **changes):
    return pipeline("a cat", **{"generator": seeded(), **changes})


class TestAtTheFirstCall:
    def test_each_stage_plans_itself(self, pipeline):
        expected = generate(pipeline)
        fxstream.optimize(pipeline, "min")
        assert fxstream.plan(pipeline).stages == ()
        assert distance(generate(pipeline), expected) <= 1e-6
        planned = fxstream.plan(pipeline).stages
        assert [stage.name for stage in planned] == ["denoiser", "codec.decode"]
        assert set(planned[0].resident.weights) == {"text_encoder", "denoiser", "codec"}
        generate(pipeline, generator=seeded(5), num_inference_steps=4)
        assert fxstream.plan(pipeline).stages == planned

    def test_chunks_have_a_plan_each(self, pipeline):
        expected = generate(pipeline)
        fxstream.optimize(pipeline, "min")
        assert distance(generate(pipeline, decode_chunk_size=4), expected) <= 1e-6
        shapes = [stage.plan.before.holders[0].shape[0] for stage in fxstream.plan(pipeline).stages[1:]]
        assert shapes == [4, 2]

    def test_a_plan_that_no_longer_fits_is_made_anew(self, pipeline):
        """The last chunk is decoded beside the frames of the others."""
        fxstream.optimize(pipeline, "1GiB")
        generate(pipeline, decode_chunk_size=2)
        (_, whole) = fxstream.plan(pipeline).stages
        assert not whole.plan.groups and whole.resident.other_bytes < 2 * whole.plan.after.peak_bytes
        budget = whole.total_bytes + 1024
        fxstream.optimize(pipeline, budget)
        expected = generate(pipeline, decode_chunk_size=2)
        (_, cut) = fxstream.plan(pipeline).stages
        assert cut.plan.groups and cut.total_bytes <= budget
        assert cut.resident.other_bytes > whole.resident.other_bytes
        assert distance(generate(fxstream.restore(pipeline)), expected) <= 1e-6


class TestAtOnce:
    def test_plans_are_those_of_the_call(self, pipeline):
        fxstream.optimize(pipeline, "min", height=24, num_frames=5, decode_chunk_size=3)
        planned = fxstream.plan(pipeline).stages
        assert [(stage.name, stage.calls, stage.streamed) for stage in planned] == [
            ("text_encoder", 1, False),
            ("denoiser", 3, True),
            ("codec.decode", 1, True),
            ("codec.decode", 1, True),
        ]
        generate(pipeline, height=24, num_frames=5, decode_chunk_size=3)
        assert [stage for stage in fxstream.plan(pipeline).stages if stage.calls is None] == []

    def test_a_plan_changes_nothing(self, pipeline):
        state, before = torch.get_rng_state(), dict(vars(pipeline))
        expected = generate(pipeline)
        planned = fxstream.plan(pipeline, num_frames=3, generator=(generator := seeded()))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(generator.get_state(), seeded().get_state())
        assert {**vars(pipeline), "scheduler": None} == {**before, "scheduler": None}
        assert torch.equal(generate(pipeline), expected)
        assert planned.peak_bytes == max(stage.total_bytes for stage in planned.stages)

    @pytest.mark.parametrize("device", ["fake", "meta"])
    def test_without_weights(self, pipeline, device):
        planned = fxstream.plan(pipeline, num_frames=4)
        bare = toy()
        if device == "fake":
            with FakeTensorMode():
                bare.register_modules(text_encoder=TextEncoder(), denoiser=Denoiser(), codec=Codec())
        else:
            for module in modules_of(bare).values():
                module.to("meta")
        found = fxstream.plan(bare, num_frames=4)
        for stage, real in zip(found.stages, planned.stages, strict=True):
            assert (stage.name, stage.calls, stage.resident) == (real.name, real.calls, real.resident)
            assert stage.plan.input_bytes == real.plan.input_bytes
            if device == "fake":
                assert stage.total_bytes == real.total_bytes

    def test_the_peak_is_what_the_allocator_sees(self, pipeline):
        """Of a whole generation, whose last stage holds most."""
        call = {"height": 48, "width": 64, "num_frames": 8}
        planned = fxstream.plan(fxstream.optimize(pipeline, 0.3, **call))
        generate(pipeline, **call)
        measured = measure_peak(generate, pipeline, **call)
        assert planned.peak_bytes == planned.stages[-1].total_bytes
        weights = planned.stages[-1].resident.weight_bytes
        assert measured.peak_bytes == pytest.approx(planned.peak_bytes - weights, rel=0.02)


class TestBudgets:
    def test_bytes_count_all_that_is_held(self, pipeline):
        lowest = fxstream.plan(pipeline).peak_bytes
        fxstream.optimize(pipeline, lowest + 2048, height=16)
        planned = fxstream.plan(pipeline)
        assert all(stage.fits for stage in planned.stages)
        assert lowest - 2048 < planned.peak_bytes <= lowest + 2048

    def test_the_stage_that_does_not_fit_is_named(self, pipeline):
        pipeline.codec.use_tiling = True
        before = dict(vars(pipeline))
        lowest = fxstream.plan(pipeline)
        with pytest.raises(fxstream.MemoryBudgetError, match=r"^codec\.decode: the budget of") as raised:
            fxstream.optimize(pipeline, int(0.9 * lowest.peak_bytes), height=16)
        error = raised.value
        assert error.stage == "codec.decode"
        assert 0.9 * lowest.peak_bytes < error.lowest_bytes <= lowest.peak_bytes
        assert fxstream.plan(pipeline, memory_budget=error.lowest_bytes).peak_bytes <= error.lowest_bytes
        assert [stage.fits for stage in error.plan.stages] == [True, True, False]
        assert "Nor do" not in str(error)
        assert {**vars(pipeline), "scheduler": None} == {**before, "scheduler": None}
        assert pipeline.codec.use_tiling

    def test_all_that_do_not_fit_are_named(self, pipeline):
        with pytest.raises(fxstream.MemoryBudgetError, match="Nor do these stages fit: text_encoder, denoiser"):
            fxstream.plan(pipeline, memory_budget="16KiB")

    def test_a_component_that_runs_whole_may_not_fit(self, pipeline):
        pipeline.text_encoder.table = nn.Embedding(256, 1 << 14)
        pipeline.enable_model_cpu_offload(device="cpu")
        pipeline.denoiser.to(torch.float32)
        with pytest.raises(fxstream.MemoryBudgetError, match=r"text_encoder: .* it runs whole and needs") as raised:
            fxstream.plan(pipeline, memory_budget="8MiB")
        assert raised.value.stage == "text_encoder"

    def test_at_the_first_call(self, pipeline):
        fxstream.optimize(pipeline, int(0.9 * fxstream.plan(pipeline).peak_bytes))
        with pytest.raises(fxstream.MemoryBudgetError, match=r"^codec\.decode: ") as raised:
            generate(pipeline)
        assert raised.value.stage == "codec.decode"

    def test_another_budget(self, pipeline):
        fxstream.optimize(pipeline, "1GiB", height=16)
        first = pipeline.denoiser
        with pytest.raises(fxstream.MemoryBudgetError):
            fxstream.optimize(pipeline, "20KiB", height=16)
        assert pipeline.denoiser is first
        fxstream.optimize(pipeline, "min", height=16)
        assert pipeline.denoiser is not first
        assert fxstream.plan(pipeline).stages[1].plan.groups
        assert type(fxstream.restore(pipeline).denoiser) is Denoiser


class TestWhatElsePipelinesDo:
    def test_other_dtypes(self, pipeline):
        fxstream.optimize(pipeline, "min")
        generate(pipeline)
        assert pipeline.to(torch.float64) is pipeline
        assert pipeline.codec.dtype is torch.float64
        assert generate(pipeline).dtype is torch.float64
        pipeline.codec.to(torch.float32)
        mixed = generate(pipeline)
        assert mixed.dtype is torch.float32
        assert len(fxstream.plan(pipeline).stages) == 4
        assert distance(mixed, generate(fxstream.restore(pipeline))) <= 1e-6

    def test_weights_fused_in_place(self, pipeline):
        """As low-rank adapters are: no new plan."""
        fxstream.optimize(pipeline, "min", height=16)
        planned, before = fxstream.plan(pipeline).stages, generate(pipeline)
        weight = pipeline.denoiser.up.weight
        weight.data += torch.randn(32, 1, generator=seeded()) @ torch.randn(1, 4, generator=seeded())
        found = generate(pipeline)
        assert fxstream.plan(pipeline).stages == planned
        assert distance(found, before) > 1e-2
        assert distance(found, generate(fxstream.restore(pipeline))) <= 1e-6

    def test_saving(self, pipeline, tmp_path):
        fxstream.optimize(pipeline, "min")
        assert pipeline.codec.config is modules_of(pipeline)["codec"].config
        pipeline.codec.save_pretrained(tmp_path / "streamed")
        fxstream.restore(pipeline).codec.save_pretrained(tmp_path / "restored")
        for folder in ("streamed", "restored"):
            saved = Codec.from_pretrained(tmp_path / folder)
            assert torch.equal(saved.rise.weight, pipeline.codec.rise.weight)

    def test_generators_share_a_plan(self, pipeline):
        fxstream.optimize(pipeline, "min")
        results = [generate(pipeline, generator=seeded(seed)) for seed in (0, 1, 0)]
        assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
        assert len(fxstream.plan(pipeline).stages) == 2

    def test_a_codec_that_draws_from_the_generator(self):
        pipeline = toy(noise=0.1)
        expected = [generate(pipeline, generator=seeded(seed)) for seed in (0, 1)]
        fxstream.optimize(pipeline, "min")
        found = [generate(pipeline, generator=seeded(seed)) for seed in (0, 1)]
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(found, expected, strict=True))

    def test_switches(self, pipeline):
        pipeline.codec.use_tiling = pipeline.codec.use_slicing = True
        with pytest.warns(UserWarning, match="tiling and slicing of the pipeline's codec turned off"):
            fxstream.optimize(pipeline, "min")
        assert not pipeline.codec.use_tiling and not pipeline.codec.use_slicing
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fxstream.optimize(pipeline, 0.5)
        codec = fxstream.restore(pipeline).codec
        assert codec.use_tiling and codec.use_slicing

    def test_nothing_to_stream(self, pipeline):
        pipeline.register_modules(denoiser=None, codec=None)
        with pytest.raises(ValueError, match="no component of ToyPipeline takes a timestep or decodes"):
            fxstream.optimize(pipeline, "min")

    def test_arguments_of_a_call(self, pipeline):
        with pytest.raises(TypeError, match="given by name: height="):
            fxstream.plan(pipeline, ("a cat",))
        with pytest.raises(TypeError, match="expected a pipeline, got Denoiser"):
            fxstream.restore(pipeline.denoiser)
        with pytest.raises(TypeError, match="unexpected keyword argument 'height': a Denoiser is no pipeline"):
            fxstream.optimize(pipeline.denoiser, "min", height=16)
        with pytest.raises(TypeError, match="'num_frames'"):
            fxstream.plan(pipeline.denoiser, num_frames=2)


@pytest.fixture(scope="module")
def rehashed():
    pipeline, call = PIPELINES["svd"]()
    pipeline.set_progress_bar_config(disable=True)
    rehash = fxstream.StepRehash(every=2, cut="deepcache", predictor="taylor")
    return fxstream.optimize(pipeline, "min", step_rehash=rehash, **call), call


class TestStepRehash:
    def test_what_the_denoiser_holds_counts_in_its_stage_alone(self, rehashed):
        pipeline, _ = rehashed
        (plan,) = pipeline.unet.plans
        stages = {stage.name: stage for stage in fxstream.plan(pipeline).stages}
        assert stages["unet"].plan.after.peak_bytes + plan.largest[1] == plan.peak_bytes
        kept = stages["unet"].resident.other_bytes - plan.largest[1]
        assert plan.largest[1] > 0 and kept <= stages["vae.decode"].resident.other_bytes < kept + plan.largest[1]

    def test_the_denoiser_skips_steps_and_holds_nothing_after_them(self, rehashed):
        pipeline, call = rehashed
        held, decode = [], pipeline.vae.decode

        def watched(*args, **kwargs):
            result = decode(*args, **kwargs)
            held.append("generation" in vars(pipeline.unet._threads))
            return result

        vars(pipeline.vae)["decode"] = watched
        pipeline(**call, num_inference_steps=5, output_type="pt", generator=seeded())
        stats = pipeline.unet.stats()
        assert (stats.full_steps, stats.skipped_steps) == (3, 2)
        assert held == [False]
