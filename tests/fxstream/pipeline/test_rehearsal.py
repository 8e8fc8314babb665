"""A pipeline's call gone through by shapes alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

import fxstream
from fxstream.pipeline.rehearsal import rehearse
from tests.fxstream.pipeline.pipelines import TextEncoder, stable_diffusion, svd, toy


def found(rehearsal):
    return [(call.component, call.method, call.calls) for call in rehearsal.calls()]


@pytest.fixture
def pipeline():
    return toy()


def test_what_is_called_and_with_what(pipeline):
    rehearsal = rehearse(pipeline, {"height": 8, "width": 12, "num_frames": 5, "decode_chunk_size": 2})
    assert found(rehearsal) == [
        ("text_encoder", "forward", 1),
        ("denoiser", "forward", 3),
        ("codec", "decode", 2),
        ("codec", "decode", 1),
    ]
    _, denoise, decode, last = rehearsal.calls()
    assert [tuple(x.shape) for x in denoise.args] == [(5, 4, 4, 6), ()]
    assert denoise.args[1].dtype is torch.int64
    assert denoise.kwargs["return_dict"] is False
    assert decode.args[0].shape == (2, 4, 4, 6) and last.args[0].shape == (1, 4, 4, 6)
    assert decode.kwargs == {"generator": None}


def test_what_is_held(pipeline):
    """Frames of 8 x 12 pixels and latents of 4 x 6: one decoded pair waits while the next is made."""
    rehearsal = rehearse(pipeline, {"height": 8, "width": 12, "num_frames": 5, "decode_chunk_size": 2})
    pair, latents = 2 * 3 * 8 * 12 * 4, 5 * 4 * 4 * 6 * 4
    decode, last = rehearsal.calls()[2:]
    small = decode.resident.other_bytes - pair
    assert 0 < small < 6 * latents
    assert last.resident.other_bytes == 2 * pair + small
    weights = [weight for module in rehearsal.modules.values() for weight in module.parameters()]
    assert decode.resident.weight_bytes == sum(weight.nbytes for weight in weights)


def test_nothing_of_the_pipelines_is_touched(pipeline):
    before = {name: dict(vars(part)) for name, part in pipeline.components.items() if hasattr(part, "parameters")}
    timesteps = pipeline.scheduler.timesteps
    rehearsal = rehearse(pipeline, {})
    assert pipeline.scheduler.timesteps is timesteps
    for name, attributes in before.items():
        assert vars(pipeline.components[name]) == attributes
        assert all(isinstance(weight, FakeTensor) for weight in rehearsal.modules[name].parameters())


def test_a_cast_on_the_way():
    """SVD encodes in float32 where its VAE asks for that, and decodes in float16."""
    pipeline, call = svd()
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.to(torch.float16)
    encode, decode = (call for call in rehearse(pipeline, call).calls() if call.component == "vae")
    assert (set(encode.dtypes), set(decode.dtypes)) == ({torch.float32}, {torch.float16})
    assert encode.resident.weights["vae"] == 2 * decode.resident.weights["vae"]
    assert pipeline.vae.dtype is torch.float16


def test_arguments_that_it_does_not_take(pipeline):
    with pytest.raises(ValueError, match="the call of ToyPipeline takes no 'fps'; it takes prompt, height"):
        rehearse(pipeline, {"fps": 7})


def test_a_call_that_lacks_something():
    """A prompt is made up, but here is no tokenizer to read it; what the pipeline says is passed on."""
    lacking = r"StableDiffusionPipeline could not .*\n.*it takes prompt, width, .*negative_prompt_embeds, .* too"
    with pytest.raises(fxstream.CaptureError, match=lacking):
        rehearse(stable_diffusion()[0], {"height": 32})


class Reading(TextEncoder):
    """Its result depends on values, which shapes do not tell."""

    def forward(self, numbers):
        return super().forward(numbers[numbers > 0][None])


def test_what_reads_values_is_asked_itself(pipeline):
    pipeline.register_modules(text_encoder=Reading())
    planned = fxstream.plan(pipeline, prompt="three words here")
    assert [stage.name for stage in planned.stages] == ["text_encoder", "denoiser", "codec.decode"]
    assert planned.stages[0].plan is None and planned.stages[0].total_bytes is None
    assert "?" in str(planned)
    pipeline.text_encoder.to("meta")
    with pytest.raises(fxstream.CaptureError, match="by shapes alone"):
        fxstream.plan(pipeline, prompt="three words here")
