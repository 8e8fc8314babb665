"""The browser that pages are looked at in, for their tests and for the pictures of the manual.

Run as a program it prints where the browser is, or that there is none.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
"""What the system's packages call it."""


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright. Raises ``FileNotFoundError`` where there is none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = _path(playwright)
        if path is None:
            raise FileNotFoundError("no Chromium was found; `make browser` installs one")
        # In a container, where the sandbox has no namespaces of its own, a page of ours needs none.
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield launched
        finally:
            launched.close()


def _path(playwright: Any) -> str | None:
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    if installed is not None:
        return installed
    own = playwright.chromium.executable_path  # which need not be there
    return own if Path(own).exists() else None


def main() -> int:
    try:
        with browser() as found:
            print(f"Chromium {found.version}")
        return 0
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
