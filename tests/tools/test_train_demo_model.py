"""Training of the demo's model goes on where it was stopped."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from diffusers import UNetMotionModel

from fxstream.tools import train_demo_model
from fxstream.tools.train_demo_model import Training


def train(training, folder, steps):
    training.run(Namespace(steps=steps, batch=1, checkpoint=folder / "checkpoint.pt", out=folder / "model"))
    return training.averaged.state_dict()


@pytest.mark.parametrize("parts", [(3, 1), (2, 2), (4, 4)], ids=str)
def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, parts):
    """Stopped within a part, and where one begins."""
    made = tuple(replace(part, steps=steps) for part, steps in zip(train_demo_model.PARTS, parts, strict=True))
    monkeypatch.setattr(train_demo_model, "PARTS", made)
    whole = train(Training(0), tmp_path, 4)
    train(Training(0), tmp_path / "parts", 3)
    rest = Training(1)
    rest.load(tmp_path / "parts" / "checkpoint.pt")
    parts = train(rest, tmp_path / "parts", 4)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    written = UNetMotionModel.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.allclose(written[name].float(), whole[name], rtol=1e-3, atol=1e-6) for name in whole)
