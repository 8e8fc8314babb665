import re
import sys

import pytest

from fxstream.tools.progress import ERASE, progress


@pytest.fixture
def terminal(monkeypatch):
    """Makes standard error a terminal, when the test calls it: until then it isn't yet the one that is captured."""
    return lambda: monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_what_is_going_on_and_how_long_it_took(terminal, capsys):
    terminal()
    with progress("planning", quiet=False):
        assert capsys.readouterr().err == "planning ... "
    assert re.fullmatch(r"\d+\.\d s\n", capsys.readouterr().err)


def test_nothing_is_left_of_what_failed(terminal, capsys):
    terminal()
    with pytest.raises(KeyError), progress("planning", quiet=False):
        raise KeyError
    assert capsys.readouterr().err.endswith(ERASE)


def test_quiet(terminal, capsys):
    terminal()
    with progress("planning", quiet=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_file_gets_none(capsys):
    with progress("planning", quiet=False):
        pass
    assert capsys.readouterr().err == ""
