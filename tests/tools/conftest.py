import pytest

from fxstream.tools import inspection
from fxstream.tools.cli import parser


def arguments(line):
    """What the command line makes of a line."""
    return parser().parse_args(line.split())


@pytest.fixture(scope="session")
def nested():
    """An inspection with loops within a loop, measured."""
    target = "tests.tools.targets:nested"
    return inspection.inspect(target, arguments(f"inspect {target} --measure --quiet"))
