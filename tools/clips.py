"""Clips as pictures: an animated GIF, and a contact sheet with a clip a row and a frame a column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

ZOOM = 3
MARGIN = 2
LABEL_WIDTH = 150
FRAME_MILLISECONDS = 120


def frames_of(clip: torch.Tensor, zoom: int = ZOOM) -> list[Image.Image]:
    """A clip (frames, 3, height, width) in [-1, 1] as pictures, its pixels enlarged."""
    pixels = ((clip + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    pictures = [Image.fromarray(frame.numpy()) for frame in pixels]
    return [
        picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST) for picture in pictures
    ]


def write_gif(clip: torch.Tensor, path: Path) -> None:
    """Write a clip as an animated GIF that repeats."""
    first, *rest = frames_of(clip, zoom=2 * ZOOM)
    first.save(path, save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0)


def write_sheet(clips: Sequence[tuple[str, torch.Tensor]], path: Path) -> None:
    """Write named clips as one picture."""
    rows = [(name, frames_of(clip)) for name, clip in clips]
    width, height = rows[0][1][0].size
    columns = len(rows[0][1])
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * (width + MARGIN), len(rows) * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows):
        top = row * (height + MARGIN)
        draw.text((4, top + height // 2 - 6), name, fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (LABEL_WIDTH + column * (width + MARGIN), top))
    sheet.save(path)
