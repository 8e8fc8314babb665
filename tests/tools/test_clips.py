"""Clips as pictures."""

from __future__ import annotations

import torch
from PIL import Image

from fxstream.tools.clips import ZOOM, write_gif, write_sheet
from fxstream.tools.shapes import draw

CLIPS = draw(2, torch.Generator().manual_seed(0)).video


def test_a_gif_has_all_frames(tmp_path):
    write_gif(CLIPS[0], tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as picture:
        assert (picture.n_frames, picture.size) == (8, (64 * ZOOM, 64 * ZOOM))


def test_a_sheet_has_a_row_a_clip(tmp_path):
    write_sheet([("one", CLIPS[0]), ("two", CLIPS[1])], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        right = picture.crop((picture.width - 32 * ZOOM - 2, 0, picture.width - 2, 32 * ZOOM))
        expected = ((CLIPS[0, -1] + 1) * 127.5).round().byte().permute(1, 2, 0)
        shrunk = torch.tensor(list(right.resize((32, 32), Image.Resampling.NEAREST).tobytes())).view(32, 32, 3)
        assert torch.equal(shrunk, expected.long())
