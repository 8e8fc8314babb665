"""Calibration: the map of a generation's steps, its file, and what refuses to be reused."""

from __future__ import annotations

import pytest
import torch

import fxstream
from fxstream import Calibration, StepRehash
from tests.denoiser import Denoiser, generate


@pytest.fixture(scope="module")
def model():
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def calibration(model):
    return fxstream.calibrate(lambda unet: generate(unet, steps=6), model, cuts=["auto", "deepcache:1"], generations=2)


def test_the_maps(calibration):
    assert calibration.steps == 6
    assert list(calibration.similarity) == ["auto", "deepcache:1"]
    for rows in calibration.similarity.values():
        found = torch.tensor(rows)
        assert found.shape == (6, 6)
        assert torch.allclose(found, found.T)
        assert torch.allclose(found.diagonal(), torch.ones(6), atol=1e-5)
        assert 0.5 < found.min() < 0.99999


def test_the_map_is_of_the_values(model, calibration):
    """Against a hook on the module after which the graph is cut."""
    seen = []
    handle = model.up_blocks[0].register_forward_hook(lambda *given: seen.append(given[-1].flatten()))
    try:
        generate(model, steps=6)
    finally:
        handle.remove()
    # What is resized after the block repeats each of its elements four times, which leaves the cosine as it is.
    unit = torch.nn.functional.normalize(torch.stack(seen), dim=1)
    assert torch.allclose(unit @ unit.T, torch.tensor(calibration.similarity["deepcache:1"]), atol=1e-4)


def test_recording_changes_nothing(model):
    results = []
    fxstream.calibrate(lambda unet: results.append(generate(unet, steps=3)), model, cuts=["paper"])
    assert torch.allclose(results[0], generate(model, steps=3), atol=1e-6)


def test_a_file_and_back(calibration, tmp_path):
    calibration.save(tmp_path / "map.json")
    assert Calibration.load(tmp_path / "map.json") == calibration


def test_a_plot(calibration, tmp_path):
    calibration.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_its_key_steps_are_run(model, calibration):
    rehash = StepRehash(calibration=calibration, full_steps=4, cut="auto")
    assert rehash.key_steps == calibration.key_steps(4, cut="auto")
    module = rehash.around(model)
    generate(module, steps=6)
    assert module.stats().full_steps == len(rehash.key_steps) <= 4


def test_a_cut_of_several_values(model):
    cut = ["up_blocks.1", "mid_block"]
    found = fxstream.calibrate(lambda unet: generate(unet, steps=3), model, cuts=[cut])
    assert StepRehash(calibration=found, full_steps=2, cut=cut).key_steps == (0, 2)
    with pytest.raises(ValueError, match=r"the cut 'up_blocks\.1' was not calibrated"):
        StepRehash(calibration=found, full_steps=2, cut="up_blocks.1")


def test_a_pipeline(model):
    class Pipeline:
        def __init__(self):
            self.transformer = model

        @property
        def components(self):
            return {"transformer": self.transformer}

        def __call__(self, steps):
            generate(self.transformer, steps=steps)

    pipe = Pipeline()
    assert fxstream.calibrate(pipe, cuts=["paper"], arguments={"steps": 3}).steps == 3
    assert pipe.transformer is model


class TestErrors:
    def test_another_number_of_steps(self, model, calibration):
        module = StepRehash(calibration=calibration, gamma=0.9).around(model)
        with pytest.raises(ValueError, match="the calibration is for other steps: its step 1 of 6"):
            generate(module, steps=5)

    def test_another_model(self, calibration):
        other = Denoiser()
        other.more = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="the calibration is of another model: of Denoiser-"):
            StepRehash(calibration=calibration, gamma=0.9).around(other.eval().requires_grad_(False))(
                torch.randn(1, 4, 3, 8, 8), torch.tensor(1000.0)
            )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "needs one of full_steps"),
            ({"full_steps": 3, "gamma": 0.9}, "needs one of full_steps"),
            ({"full_steps": 7}, "full_steps=7 is out of range"),
            ({"gamma": 1.5}, "gamma=1.5 is out of range"),
            ({"gamma": 0.9, "steps": 25}, "the calibration is for 6 steps, not 25"),
            ({"gamma": 0.9, "cut": "paper"}, "the cut 'paper' was not calibrated: there are auto, deepcache:1"),
        ],
    )
    def test_settings(self, calibration, settings, message):
        with pytest.raises(ValueError, match=message):
            StepRehash(calibration=calibration, **settings)

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "map.json").write_text("{}")
        with pytest.raises(ValueError, match="is no calibration"):
            Calibration.load(tmp_path / "map.json")

    def test_nothing_to_run(self, model):
        with pytest.raises(ValueError, match="makes no generation"):
            fxstream.calibrate(model)
        with pytest.raises(ValueError, match="needs the model as well"):
            fxstream.calibrate(generate)
        with pytest.raises(ValueError, match="at 0 timesteps"):
            fxstream.calibrate(lambda unet: None, model)
