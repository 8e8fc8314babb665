"""Optimized pipelines beside what else people do: other pipelines of the same components, torch.compile."""

import gc
import weakref

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, ZImageTransformer2DModel
from torch import nn

import fxstream
from fxstream.module import StreamedModule
from fxstream.pipeline.components import streamed_methods
from tests.fxstream.pipeline.pipelines import PIPELINES, image, toy


def pixels(pipeline, call):
    generator = torch.Generator().manual_seed(2)
    return torch.from_numpy(pipeline(**call, num_inference_steps=2, output_type="np", generator=generator).images)


@pytest.fixture
def diffusion():
    pipeline, call = PIPELINES["stable-diffusion"]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, call


def close(found, expected):
    assert (found - expected).norm() <= 1e-5 * expected.norm()


class TestFromPipe:
    @pytest.mark.parametrize("which", ["first", "second"])
    def test_the_other_is_streamed_and_restored_with_it(self, diffusion, which):
        first, call = diffusion
        expected = pixels(first, call)
        fxstream.optimize(first, memory_budget="min")
        second = StableDiffusionImg2ImgPipeline.from_pipe(first)
        assert second.unet is first.unet and isinstance(second.unet, StreamedModule)
        prompts = {name: call[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
        given = {**prompts, "image": image(32, 32), "strength": 0.9}
        torch.manual_seed(0)
        streamed = pixels(second, given)
        assert fxstream.plan(second).stages
        fxstream.restore(first if which == "first" else second)
        plans = len(fxstream.plan(second if which == "first" else first).stages)
        torch.manual_seed(0)
        close(streamed, pixels(second, given))
        close(pixels(first, call), expected)
        assert len(fxstream.plan(second if which == "first" else first).stages) == plans  # the models themselves ran

    def test_the_first_may_be_gone(self):
        first, _ = PIPELINES["stable-diffusion"]()
        second = StableDiffusionImg2ImgPipeline.from_pipe(fxstream.optimize(first, memory_budget="4GiB"))
        alive = weakref.ref(first)
        del first
        gc.collect()
        weights = sum(x.nbytes for module in (second.unet, second.vae) for x in module.parameters())
        stage = vars(second.vae)["_streamed_pipeline"].stages[0]
        assert alive() is None and stage.resident((torch.ones(1),)).weight_bytes == weights


class TestCompile:
    def test_a_component_compiled_after(self, diffusion):
        pipeline, call = diffusion
        expected = pixels(pipeline, call)
        fxstream.optimize(pipeline, memory_budget="4GiB")
        pipeline.unet = torch.compile(pipeline.unet, backend="eager")
        close(pixels(pipeline, call), expected)
        assert {stage.name for stage in fxstream.plan(pipeline).stages} == {"unet", "vae.decode"}

    def test_a_component_that_compiles_itself(self, diffusion):
        pipeline, call = diffusion
        expected = pixels(pipeline, call)
        fxstream.optimize(pipeline, memory_budget="4GiB")
        pipeline.unet.compile(backend="eager")
        close(pixels(pipeline, call), expected)

    def test_one_compiled_before_is_refused(self, diffusion):
        pipeline, _ = diffusion
        unet = pipeline.unet
        pipeline.unet = torch.compile(unet, backend="eager")
        for function in (fxstream.optimize, fxstream.plan):
            with pytest.raises(ValueError, match=r"pipeline's unet is torch.compile\(UNet2DConditionModel\)"):
                function(pipeline, memory_budget="min")
        pipeline.unet = pipeline.unet._orig_mod
        assert fxstream.optimize(pipeline, memory_budget="min").unet is not unet

    def test_one_that_compiles_itself_before(self, diffusion):
        pipeline, call = diffusion
        expected = pixels(pipeline, call)
        pipeline.unet.compile(backend="eager")
        fxstream.optimize(pipeline, memory_budget="4GiB")
        close(pixels(pipeline, call), expected)
        assert pipeline.unet.plans


class TestStages:
    def test_a_denoiser_is_known_by_its_time_whatever_that_is_called(self):
        sizes = {"n_layers": 1, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": (4, 6, 6)}
        with torch.device("meta"):
            assert streamed_methods(ZImageTransformer2DModel(dim=64, cap_feat_dim=32, **sizes)) == ("forward",)

        class Named(nn.Module):
            def forward(self, sample, local_latents_time):
                return sample

        class Encoder(nn.Module):
            def forward(self, tokens, attention_mask, time_last):
                return tokens

        assert streamed_methods(Named()) == ("forward",) and not streamed_methods(Encoder())

    def test_what_runs_whole_is_said_to(self):
        planned = fxstream.plan(toy(), memory_budget="min", prompt="a cat")
        assert {stage.name: stage.streamed for stage in planned.stages}["text_encoder"] is False
        assert "text_encoder is not streamed: it takes no time" in str(planned)
        assert "\n" not in repr(planned) and "<pre>" in planned._repr_html_()
