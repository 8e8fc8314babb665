"""Threads: planning takes turns, and what is planned or not streamed at all runs beside it. More rounds: the tool."""

import pytest

from fxstream.tools.threads import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_what_the_model_gives(kind):
    assert KINDS[kind](2) == []
