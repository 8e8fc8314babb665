"""The command line. Help and errors of usage come at once: what needs torch is imported by the command that runs."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fxstream.budget import Budget
from fxstream.tools.errors import UsageError, one_line
from fxstream.tools.files import STDOUT, Suffix
from fxstream.tools.targets import FORMS, NAMES, check

DTYPES = ("float16", "bfloat16", "float32")
SHELLS = ("bash", "zsh")

OK, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

CODES = """exit codes:
  0    done
  1    an error of fxstream's own; --debug shows where
  2    input that can't be used, or a budget that can't be met
  130  interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the chart's characters
    try:
        for target in args.targets(args):
            check(target)
        code: int = import_module(f"fxstream.tools.{args.module}").run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return INTERRUPTED
    except UsageError as error:
        return _failed(str(error), UNUSABLE, args.debug)
    except Exception as error:
        return _failed(f"{one_line(error)} (an error of fxstream's own: --debug shows where)", FAILED, args.debug)


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"fxstream: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage before them."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: TARGET"):
            message += ", before options that take a FILE"
        self.exit(UNUSABLE, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    made = _Parser(
        prog="fxstream",
        description="Make video diffusion models fit a memory budget, exactly.",
        epilog=CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = made.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _inspect(commands)
    _fit(commands)
    _compare(commands)
    models = commands.add_parser("models", help="the catalogue", description="List the models known by name.")
    _common(models, "models", [])
    env = commands.add_parser(
        "env", help="versions and devices, for a bug report", description="Print what a bug report should tell."
    )
    _common(env, "environment", [])
    machine = commands.add_parser(
        "machine",
        help="what is known of this machine",
        description="Print what plans for this machine are made with: its kernels, how many of their calls were "
        "measured, and what a launch, a byte and an operation cost.",
    )
    machine.add_argument(
        "--measure", action="store_true", help="measure the prices now, in some seconds, and keep them"
    )
    machine.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    _common(machine, "machine", [])
    completion = commands.add_parser(
        "completion",
        help="completion for a shell",
        description="Print a script that completes fxstream's commands: source it, or put it where the shell looks.",
    )
    completion.add_argument("shell", choices=SHELLS)
    _common(completion, "completion", [])
    return made


def _inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="what streaming a model would do to its memory",
        description="Say where a model's memory peaks and what streaming would make of it. The model stands at its "
        "published size without weights: nothing is downloaded, allocated or run, unless --measure asks for it.",
    )
    _target(command)
    _size(command)
    _budget_option(command)
    command.add_argument(
        "--offload", choices=["disk"], help="weights may live on disk, so that the budget may be below them"
    )
    command.add_argument("--measure", action="store_true", help="run it too, on random weights, and measure the peaks")
    forms = command.add_argument_group(
        "forms of output", "Of text, without FILE (or with -), one goes to standard output in place of the report."
    )
    for option, to, what in (
        ("--json", STDOUT, "everything, as JSON"),
        ("--csv", STDOUT, "the schedules with the bytes live at each operator"),
        ("--html", "html", "a page to look around in; one file, no network"),
        ("--png", "png", "the memory timeline (needs matplotlib)"),
        ("--svg", "svg", "the same as vector graphics"),
        ("--trace", "trace.json", "a trace for ui.perfetto.dev, with a counter of memory"),
        ("--dot", STDOUT, "the graph by module for Graphviz, loops framed"),
        ("--code", STDOUT, "the rewritten graph as a readable program"),
    ):
        _file(forms, option, to, what)
    _common(command, "inspection", ["target"])


def _fit(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "fit",
        help="the largest video that fits a memory",
        description="Find the most frames that fit (give --height and --width, or neither), or the largest resolution "
        "(give --frames). Given all three: what each budget costs in time.",
    )
    _target(command)
    command.add_argument(
        "--memory", type=_memory, help='what the call may hold: "8GiB", or bytes; needed but for the curve of budgets'
    )
    _size(command)
    command.add_argument("--measure", action="store_true", help="run each plan of the curve too, and measure it")
    forms = command.add_argument_group("forms of output", "Without FILE, JSON and CSV go to standard output.")
    for option, to, what in (
        ("--json", STDOUT, "the table, as JSON"),
        ("--csv", STDOUT, "the table, as CSV"),
        ("--png", "png", "the curve (needs matplotlib)"),
        ("--svg", "svg", "the same as vector graphics"),
    ):
        _file(forms, option, to, what)
    _common(command, "fit", ["target"])


def _compare(commands: argparse._SubParsersAction[_Parser]) -> None:
    command = commands.add_parser(
        "compare",
        help="two plans side by side",
        description="Set two plans side by side. Each is a file that `inspect --json` wrote, or a TARGET, which is "
        "planned with the options given.",
    )
    for name, metavar in (("first", "A"), ("second", "B")):
        command.add_argument(name, metavar=metavar, help="a plan's JSON file, or a TARGET")
    _size(command)
    _budget_option(command)
    _file(command, "--json", STDOUT, "the comparison, as JSON")
    _common(command, "compare", ["first", "second"])


def _target(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="TARGET", help=f"{FORMS}; the names are {', '.join(NAMES)}")


def _size(command: argparse.ArgumentParser) -> None:
    size = command.add_argument_group("the call", "What is not given is as published.")
    size.add_argument("--frames", type=_count, help="frames of the video")
    size.add_argument("--height", type=_pixels, help="pixels")
    size.add_argument("--width", type=_pixels, help="pixels")
    size.add_argument("--batch", type=_count, help="videos in a call (default: 2, for classifier-free guidance)")
    size.add_argument(
        "--dtype", metavar="DTYPE", choices=DTYPES, help=", ".join(DTYPES) + " (default: float16; with --small float32)"
    )
    size.add_argument(
        "--device",
        help="where it would run, such as cpu (default: cuda, here or not; with --measure and no card, and with "
        "--offload, cpu)",
    )
    size.add_argument("--component", help="which model of a pipeline's folder: unet, transformer or vae")
    size.add_argument(
        "--small", action="store_true", help="the catalogue's model with few channels, which any CPU runs"
    )


def _budget_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        type=_budget,
        default="min",
        help='"6GiB", "800MB" or bytes, for weights, inputs and activations; a share of the activation peak such as '
        '0.5; or "min", the lowest reachable (default: min)',
    )


def _file(command: argparse._ActionsContainer, option: str, to: str, what: str) -> None:
    where = "standard output" if to == STDOUT else f"TARGET's name and .{to}"
    const = to if to == STDOUT else Suffix(to)
    command.add_argument(option, nargs="?", const=const, metavar="FILE", help=f"{what} (default FILE: {where})")


def _common(command: argparse.ArgumentParser, module: str, targets: Sequence[str]) -> None:
    command.add_argument("--quiet", action="store_true", help="no progress on standard error")
    command.add_argument("--debug", action="store_true", help="with an error, a traceback")
    command.set_defaults(module=module, targets=lambda args: [getattr(args, name) for name in targets])


def _version() -> str:
    from importlib.metadata import version

    return version("fxstream")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _pixels(text: str) -> int:
    if _count(text) % 8:
        raise argparse.ArgumentTypeError(f"{text} pixels are not a multiple of 8, the step of a latent")
    return int(text)


def _budget(text: str) -> str | int | float:
    """A budget as `fxstream.optimize` takes it: what reads as a number is one."""
    budget: str | int | float = text
    for kind in (float, int):
        try:
            budget = kind(text)
        except ValueError:
            continue
    try:
        Budget.parse(budget)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("memory_budget ")) from None
    return budget


def _memory(text: str) -> int:
    """Bytes of all that a call may hold."""
    total = Budget.parse(budget).total_bytes if isinstance(budget := _budget(text), (str, int)) else None
    if total is None:
        raise argparse.ArgumentTypeError(f'{text!r} is not a size of memory: use "8GiB" or bytes')
    return total


if __name__ == "__main__":
    sys.exit(main())
