"""The collector of cycles waits, and goes on as before."""

import gc

import pytest

from fxstream.passes.graph.collector import collector_paused


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_as_before_after_errors_too(enabled):
    @collector_paused()
    def fail():
        assert not gc.isenabled()
        raise ValueError

    try:
        if not enabled:
            gc.disable()
        with pytest.raises(ValueError):
            fail()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
