import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.tools import catalogue
from fxstream.tools.measure import measure_peak

GIB = 2**30
NAMES = list(catalogue.CATALOGUE)
UNETS = [entry.name for entry in catalogue.UNETS]
TRANSFORMERS = [entry.name for entry in catalogue.TRANSFORMERS]

# Bytes of the published weights in float16.
PARAMETER_GIB = {
    "svd-unet": 2.84,
    "svd-xt-unet": 2.84,
    "animatediff-unet": 2.45,
    "modelscope-unet": 2.63,
    "i2vgenxl-unet": 2.65,
    "svd-vae": 0.182,
    "sd-vae": 0.156,
    "sd-vae-encode": 0.156,
    "wan-transformer": 2.64,
    "cogvideox-transformer": 3.15,
    "ltx-transformer": 3.58,
    "hunyuanvideo-transformer": 23.88,
    "wan-vae": 0.236,
    "cogvideox-vae": 0.401,
    "ltx-vae": 0.78,
    "hunyuanvideo-vae": 0.459,
}

LATENTS = {
    "svd-unet": (2, 14, 8, 72, 128),
    "svd-xt-unet": (2, 25, 8, 72, 128),
    "animatediff-unet": (2, 4, 16, 72, 128),
    "modelscope-unet": (2, 4, 16, 40, 72),
    "i2vgenxl-unet": (2, 4, 16, 88, 160),
    "svd-vae": (14, 4, 72, 128),
    "sd-vae": (16, 4, 72, 128),
    "sd-vae-encode": (16, 3, 576, 1024),
    "wan-transformer": (2, 16, 21, 60, 104),
    "cogvideox-transformer": (2, 13, 16, 60, 90),
    "ltx-transformer": (2, 21 * 16 * 24, 128),
    "hunyuanvideo-transformer": (1, 16, 33, 68, 120),
    "wan-vae": (1, 16, 21, 60, 104),
    "cogvideox-vae": (1, 16, 13, 60, 90),
    "ltx-vae": (1, 128, 21, 16, 24),
    "hunyuanvideo-vae": (1, 16, 9, 68, 120),
}


def module_of(model):
    """The module itself, of one that is called by another method than forward."""
    return getattr(model, "__self__", model)


def frame_dim(name):
    return 1 if name.startswith("svd") else 2


def test_import_is_cheap():
    code = "import sys, fxstream.tools.catalogue; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_published_models_build_without_memory(name):
    measured = measure_peak(catalogue.build, name)
    model, args, kwargs = measured.result
    parameters = list(module_of(model).parameters())
    tensors = [value for value in [*parameters, *args, *kwargs.values()] if isinstance(value, torch.Tensor)]
    assert all(isinstance(tensor, FakeTensor) for tensor in tensors)
    assert measured.peak_bytes < 2**20
    assert {parameter.dtype for parameter in parameters} == {torch.float16}
    assert sum(parameter.nbytes for parameter in parameters) / GIB == pytest.approx(PARAMETER_GIB[name], rel=0.01)
    assert args[0].shape == LATENTS[name]
    assert not module_of(model).training
    assert torch.get_default_dtype() == torch.float32


def test_published_models_take_other_shapes():
    model, args, kwargs = catalogue.build(
        "svd-unet", frames=7, height=320, width=512, batch=1, dtype=torch.bfloat16, fake=True
    )
    assert args[0].shape == (1, 7, 8, 40, 64)
    assert args[0].dtype == model.dtype == torch.bfloat16
    with args[0].fake_mode, torch.no_grad():
        (output,) = model(*args, **kwargs)
    assert output.shape == (1, 7, 4, 40, 64)


@pytest.mark.parametrize("name", UNETS)
def test_small_models_mix_frames(name):
    model, args, kwargs = catalogue.small(name)
    latents = args[0]
    moved = latents.clone()
    moved.select(frame_dim(name), 0).normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (before,) = model(*args, **kwargs)
        (after,) = model(moved, *args[1:], **kwargs)
    assert before.isfinite().all()
    assert before.shape == after.shape
    changes = (after - before).unbind(frame_dim(name))[1:]
    frames = before.unbind(frame_dim(name))[1:]
    for change, frame in zip(changes, frames, strict=True):
        assert change.norm() > 0.01 * frame.norm()


@pytest.mark.parametrize("name", UNETS)
def test_small_models_run_at_other_shapes(name):
    model, args, kwargs = catalogue.small(name, frames=7, height=24, width=40, seed=3)
    with torch.no_grad():
        (output,) = model(*args, **kwargs)
    expected = list(args[0].shape)
    if name.startswith("svd"):
        expected[2] = 4
    assert list(output.shape) == expected
    assert output.std() > 0.01


FRAME_DIM = {"wan-transformer": 2, "cogvideox-transformer": 1, "ltx-transformer": 1, "hunyuanvideo-transformer": 2}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_small_transformers_mix_frames(name):
    model, args, kwargs = catalogue.small(name, frames=17, height=4, width=6)
    moved = args[0].clone()
    moved.select(FRAME_DIM[name], 0).normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (before,) = model(*args, **kwargs)
        (after,) = model(moved, *args[1:], **kwargs)
    assert before.shape == args[0].shape
    change, last = ((value.select(FRAME_DIM[name], -1)) for value in (after - before, before))
    assert change.norm() > 0.001 * last.norm() > 0


@pytest.mark.parametrize("name", ["wan-vae", "cogvideox-vae", "ltx-vae", "hunyuanvideo-vae"])
def test_small_decoders_make_more_frames(name):
    decode, args, kwargs = catalogue.small(name, frames=9, height=4, width=6, batch=1)
    frames, pixels = catalogue.CATALOGUE[name].shape.steps
    assert args[0].shape[2:] == (8 // frames + 1, 4, 6)
    with torch.no_grad():
        (output,) = decode(*args, **kwargs)
    assert output.shape == (1, 3, 9, 4 * pixels, 6 * pixels)
    assert output.std() > 0.01


@pytest.mark.parametrize("name", ["svd-vae", "sd-vae"])
def test_small_decoders_make_frames(name):
    decode, args, kwargs = catalogue.small(name, frames=3, height=4, width=6, batch=1)
    with torch.no_grad():
        (output,) = decode(*args, **kwargs)
    assert output.shape == (3, 3, 32, 48)
    assert output.std() > 0.01


def test_small_encoder():
    encode, args, kwargs = catalogue.small("sd-vae-encode", frames=3, height=4, width=6, batch=1)
    with torch.no_grad():
        (output,) = encode(*args, **kwargs)
    assert output.mean.shape == (3, 4, 4, 6)


def test_small_models_in_half_precision():
    model, args, kwargs = catalogue.small("modelscope-unet", dtype=torch.bfloat16, frames=2, height=8, width=8)
    with torch.no_grad():
        (output,) = model(*args, **kwargs)
    assert output.dtype == model.dtype == torch.bfloat16


def test_seed_decides_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    (one, args, _), (same, same_args, _), (other, _, _) = (
        catalogue.small("svd-unet", seed=seed, height=8, width=8) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(args[0], same_args[0])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


@pytest.mark.parametrize("name", NAMES)
def test_small_models_have_no_constant_weights(name):
    model, _, _ = catalogue.small(name)
    constant = [key for key, value in module_of(model).named_parameters() if value.numel() > 1 and value.std() == 0]
    assert constant == []


def test_unknown_name():
    with pytest.raises(KeyError, match="svd-unet"):
        catalogue.build("nope")
