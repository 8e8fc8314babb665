"""The code of docs/pipelines.md runs from top to bottom, around a small pipeline."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from fxstream.module import StreamedModule
from tests.fxstream.pipelines import ToyPipeline, toy

PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *args, **kwargs: toy())
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks[:-1]:
        exec(compile(block, str(PAGE), "exec"), names)
    pipeline, printed = names["pipe"], capsys.readouterr().out
    assert isinstance(pipeline, ToyPipeline) and isinstance(pipeline.denoiser, StreamedModule)
    assert torch.is_tensor(names["video"]) and names["video"].shape == (16, 3, 256, 256)
    assert printed.count("codec.decode") >= 3
    assert str(names["plan"].peak_bytes) in printed
    exec(blocks[-1], names)
    assert not isinstance(pipeline.denoiser, StreamedModule)
