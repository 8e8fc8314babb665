"""Training of the demo's model: it goes on where it was stopped, and each leg begins with the averaged weights."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from diffusers import UNetMotionModel

from fxstream.tools import train_demo_model
from fxstream.tools.train_demo_model import Training


@pytest.fixture(autouse=True)
def short_legs(monkeypatch):
    monkeypatch.setattr(train_demo_model, "LEGS", ((2, 1e-3), (2, 1e-3)))


def train(training, folder, steps):
    training.run(Namespace(steps=steps, batch=1, checkpoint=folder / "checkpoint.pt", out=folder / "model"))
    return training.averaged.state_dict()


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = train(Training(0), tmp_path, 4)
    train(Training(0), tmp_path / "parts", 3)
    rest = Training(1)
    rest.load(tmp_path / "parts" / "checkpoint.pt")
    parts = train(rest, tmp_path / "parts", 4)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    written = UNetMotionModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.allclose(written[name].float(), whole[name], rtol=1e-3, atol=1e-6) for name in whole)


def test_a_leg_begins_with_the_averaged_weights(tmp_path):
    training = Training(0)
    for steps, begins in ((1, False), (2, True), (3, False)):
        averaged = train(training, tmp_path, steps)
        assert begins is all(torch.equal(averaged[name], w) for name, w in training.model.state_dict().items())
