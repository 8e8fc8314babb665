"""What the command line says of input that it can't use."""

from __future__ import annotations


class UsageError(Exception):
    """Input that can't be used. The message is one line: what was wrong, and what to do."""


def one_line(error: BaseException) -> str:
    """An error's kind and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
