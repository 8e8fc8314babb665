"""Makes the manual's pictures: the timeline of a published model's plan, and the page that it is looked at in.

Run with `make pictures`; it needs a browser, which `make browser` installs.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from fxstream.tools import inspection, picture
from fxstream.tools.browser import browser
from fxstream.tools.cli import parser
from fxstream.tools.html import to_html

FOLDER = Path("docs/pictures")
COMMAND = ["inspect", "svd-unet"]
COLOURS = 64
"""Colours of a picture: these have few, and a small file is soon fetched."""


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    args = parser().parse_args(COMMAND)
    found = inspection.inspect(args.target, args).found
    _save("timeline", picture.timeline(found, "png"))
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        file = Path(folder) / "page.html"
        file.write_text(to_html(found), encoding="utf-8")
        page = chromium.new_page(viewport={"width": 1000, "height": 1085})
        page.goto(file.as_uri())
        page.hover("#before", position={"x": 180, "y": 60})
        _save("page", page.screenshot())


def _save(name: str, png: bytes) -> None:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
