import json
import shutil

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.tools import catalogue, targets
from fxstream.tools.errors import UsageError
from fxstream.tools.targets import Size, load

SMALL_UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
SMALL_VAE = {"block_out_channels": [8, 16], "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 2}


def saved(folder, kind, **config):
    """The configuration of a diffusers model, as diffusers saves it, without weights."""
    kind(**config).save_config(folder)
    return folder


@pytest.fixture
def pipeline(tmp_path):
    """The folder of a pipeline, configurations alone."""
    saved(tmp_path / "unet", diffusers.UNet2DConditionModel, **SMALL_UNET)
    saved(tmp_path / "vae", diffusers.AutoencoderKL, **SMALL_VAE, up_block_types=["UpDecoderBlock2D"] * 2)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_names_are_those_of_the_catalogue():
    assert list(targets.NAMES) == list(catalogue.CATALOGUE)


def test_a_name_at_a_size():
    target = load("svd-unet", Size(frames=3, height=64, width=128, batch=1, dtype="bfloat16"))
    assert target.call is target.model
    assert target.args[0].shape == (1, 3, 8, 8, 16)
    assert target.args[0].dtype == torch.bfloat16
    assert target.shape == catalogue.Shape(3, 64, 128, 1)
    assert target.kind == "UNetSpatioTemporalConditionModel"
    assert target.inputs()[0] == "sample 1x3x8x8x16 bfloat16"
    assert target.steps == targets.Steps(1, 64)


def test_a_small_model_runs():
    target = load("modelscope-unet", Size(frames=2, height=64, width=64), small=True, fake=False)
    assert target.args[0].shape == (2, 4, 2, 8, 8)
    assert target.call(*target.args, **target.kwargs)[0].shape == (2, 4, 2, 8, 8)


def test_a_method_that_the_catalogue_names():
    target = load("svd-vae", Size(frames=1, height=64, width=64))
    assert target.call == target.model.decode
    assert target.kind == "AutoencoderKLTemporalDecoder.decode"
    assert target.inputs() == ["z 1x4x8x8 float16"]
    assert target.steps == targets.Steps(1, 8)


@pytest.mark.parametrize("form", ["folder", "file", "any file"])
def test_a_configuration(tmp_path, form):
    folder = saved(tmp_path / "mine", diffusers.UNet2DConditionModel, **SMALL_UNET)
    (folder / "config.json").rename(tmp_path / "other.json") if form == "any file" else None
    path = {"folder": folder, "file": folder / "config.json", "any file": tmp_path / "other.json"}[form]
    target = load(str(path), Size(frames=2, height=64, width=96, batch=1, dtype="float32"))
    assert target.name == ("other" if form == "any file" else "mine")
    assert target.kwargs["sample"].shape == (2, 4, 8, 12)
    assert target.kwargs["encoder_hidden_states"].shape == (2, 77, 12)
    assert all(isinstance(weight, FakeTensor) for weight in target.model.parameters())
    assert target.steps.pixels == 16


def test_a_class_of_the_catalogue_gets_its_inputs(tmp_path):
    model, _, _ = catalogue.small("animatediff-unet")
    model.save_config(tmp_path)
    target = load(str(tmp_path), Size(frames=3, height=64, width=64, batch=1))
    assert [tuple(x.shape) for x in target.args] == [(1, 4, 3, 8, 8), (), (3, 77, 32)]


def test_the_components_of_a_pipeline(pipeline):
    unet = load(str(pipeline), Size(), component="unet")
    assert unet.name == "unet"
    assert unet.kwargs["sample"].shape == (2, 4, 64, 64)  # an image, as no frames were given
    vae = load(str(pipeline / "model_index.json"), Size(height=64, width=96), component="vae")
    assert vae.kind == "AutoencoderKL.decode"
    assert vae.kwargs["z"].shape == (1, 4, 32, 48)


def test_a_function():
    target = load("tests.tools.targets:feedforward", Size(frames=5, dtype="bfloat16"))
    assert target.name == "feedforward"
    assert target.shape is None
    assert target.args[0].shape == (5, 16)
    assert target.args[0].dtype == torch.bfloat16


def test_functions_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own.py").write_text("from tests.tools.targets import feedforward as make\n")
    monkeypatch.chdir(tmp_path)
    assert load("my_own:make", Size()).name == "make"


BAD_FILES = {
    "broken.json": ('{"_class_name": ', "is no JSON: line 1, column 17"),
    "list.json": ("[1]", "it holds a list"),
    "nameless.json": ("{}", "it has no _class_name"),
    "unknown.json": ('{"_class_name": "NoSuchModel"}', "has no class NoSuchModel"),
    "scheduler.json": ('{"_class_name": "DDIMScheduler"}', "DDIMScheduler, which is no model"),
    "values.json": ('{"_class_name": "UNet2DConditionModel", "block_out_channels": [7]}', "can't be built from"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as raised:
        load(str(tmp_path / name), Size())
    assert message in str(raised.value)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("nope", {}, "there is no model 'nope' in the catalogue"),
        ("svd-unett", {}, "did you mean svd-unet?"),
        ("missing/config.json", {}, "there is no file or folder missing/config.json"),
        ("{empty}", {}, "neither a config.json"),
        ("{bare}", {}, "has no folder with the config.json of a diffusers model"),
        ("{bare}", {"component": "unet"}, "has no folder with the config.json of a diffusers model"),
        ("{pipeline}", {}, "--component unet or vae"),
        ("{pipeline}", {"component": "text_encoder"}, "one of unet, vae"),
        ("svd-unet", {"component": "unet"}, "--component is for a pipeline's folder"),
        ("{pipeline}/unet", {"component": "unet"}, "--component is for a pipeline's folder"),
        ("{pipeline}/unet", {"small": True}, "--small is for models of the catalogue"),
        ("no_such_module:make", {}, "there is no module no_such_module"),
        ("tests.nothing:make", {}, "there is no module tests.nothing"),
        ("tests.tools.targets:make", {}, "has nothing called make"),
        ("tests.tools.targets:not_a_function", {}, "has a int, not a function, called not_a_function"),
        ("tests.tools.targets:", {}, "not of the form package.module:function"),
        ("tests.tools.targets:broken", {}, "raised ValueError: no luck"),
        ("tests.tools.targets:leaving", {}, "raised SystemExit: 3"),
        ("tests.tools.targets:a_number", {}, "returned a int, not (model, args, kwargs)"),
        ("tests.tools.targets:no_model", {}, "returned (int, tuple, dict), not (model, args, kwargs)"),
        ("tests.tools.targets:nested", {"size": Size(frames=3)}, "takes no argument for --frames"),
        ("svd-unet", {"size": Size(device="nowhere")}, "--device nowhere can't be used"),
    ],
)
def test_what_cannot_be_a_target(pipeline, tmp_path, target, options, message):
    folders = {"pipeline": pipeline, "empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    for name in ("empty", "bare"):
        folders[name].mkdir()
    shutil.copy(pipeline / "model_index.json", folders["bare"])
    size = options.pop("size", Size())
    with pytest.raises(UsageError) as raised:
        load(target.format(**folders), size, **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_module_that_fails_when_imported(tmp_path, monkeypatch):
    (tmp_path / "fails_itself.py").write_text("1 / 0\n")
    (tmp_path / "wants_another.py").write_text("import no_such_thing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="fails_itself raised ZeroDivisionError: division by zero when imported"):
        load("fails_itself:make", Size())
    with pytest.raises(UsageError, match=r"No module named 'no_such_thing'.*install what it needs"):
        load("wants_another:make", Size())
