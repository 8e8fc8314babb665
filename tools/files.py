"""Where a command's output goes: to files, or one form of text to standard output."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from fxstream.tools.errors import UsageError

STDOUT = "-"


class Suffix(str):
    """In place of a file's name: the file is called as the target is, with this suffix."""


def named(path: str, name: str) -> str:
    """The file that an option means, for the target ``name``."""
    return f"{name}.{path}" if isinstance(path, Suffix) else path


def check_writable(paths: Mapping[str, str | None]) -> None:
    """Raises ``UsageError`` for a file that can't be written, before any work is done for it.

    ``paths`` maps an option to its file, `-` for standard output, or None where it wasn't given.
    """
    to_stdout = [option for option, path in paths.items() if path == STDOUT]
    if len(to_stdout) > 1:
        raise UsageError(f"{' and '.join(to_stdout)} can't both go to standard output; name a file for one")
    given: dict[str, str] = {}
    for option, path in paths.items():
        if path is None or path == STDOUT or isinstance(path, Suffix):
            continue
        if path in given:
            raise UsageError(f"{given[path]} and {option} would both write {path}; name another file")
        given[path] = option
        folder = Path(path).parent
        if Path(path).is_dir():
            raise UsageError(f"{option} {path} is a folder; name a file")
        if not folder.is_dir():
            raise UsageError(f"{option} {path} can't be written: there is no folder {folder}")


def write(path: str, content: str | bytes, quiet: bool) -> None:
    """Writes a form of output to its file, and says so; or to standard output."""
    if path == STDOUT:
        assert isinstance(content, str)
        sys.stdout.write(content)
        return
    data = content.encode() if isinstance(content, str) else content
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}; name another file") from None
    if not quiet:
        print(f"wrote {path}", file=sys.stderr)
