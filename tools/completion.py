"""`fxstream completion`: completion of commands, options and targets in a shell."""

from __future__ import annotations

import argparse

import shtab

from fxstream.tools.cli import parser
from fxstream.tools.targets import NAMES

TARGET = {
    "bash": "_fxstream_target",
    "zsh": "_fxstream_target",
}
PREAMBLE = {
    "bash": f"""_fxstream_target() {{
  compgen -W "{" ".join(NAMES)}" -- "$1"
  compgen -f -- "$1"
}}""",
    "zsh": f"""_fxstream_target() {{
  _alternative 'models:model:({" ".join(NAMES)})' 'files:file:_files'
}}""",
}


def run(args: argparse.Namespace) -> int:
    """The command."""
    print(shtab.complete(_prepared(parser()), args.shell, preamble=PREAMBLE))
    return 0


def _prepared(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, its arguments marked with how their values are completed."""
    commands = next(action for action in made._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        for action in command._actions:
            if action.metavar in ("TARGET", "A", "B"):
                action.complete = TARGET
            elif action.metavar == "FILE":
                action.complete = shtab.FILE
    return made
