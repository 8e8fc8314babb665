import pytest
import torch
from torch.profiler import record_function

from fxstream.tools.measure import allocator_trace, measure_peak

KIB = 1024


def kib(n):
    """An uninitialised tensor of n KiB."""
    return torch.empty(n * KIB, dtype=torch.uint8)


def test_frees_lower_what_is_live_but_not_the_peak():
    def call():
        a, b = kib(100), kib(200)
        del a
        c = kib(50)
        del b
        return c

    measured = measure_peak(call)
    assert measured.peak_bytes == 300 * KIB
    assert measured.final_bytes == 50 * KIB
    assert measured.result.numel() == 50 * KIB


def test_peak_after_a_free():
    def call():
        a = kib(100)
        del a
        b, c = kib(70), kib(80)
        return b, c

    assert measure_peak(call).peak_bytes == 150 * KIB


def test_temporaries_of_nested_operators_count():
    a, b, c = torch.randn(3, 1000)
    measured = measure_peak(lambda a, b, c: (a + b) * c, a, b, c=c)
    assert measured.peak_bytes == 8000
    assert measured.final_bytes == 4000
    torch.testing.assert_close(measured.result, (a + b) * c, rtol=0, atol=0)


def test_views_and_in_place_operators_take_nothing():
    x = torch.randn(1000)
    assert measure_peak(lambda: x.view(10, 100).t().relu_()).peak_bytes == 0


def test_what_was_there_before_is_not_counted():
    held = [kib(500)]

    def call():
        held.clear()
        return kib(10)

    assert measure_peak(call).peak_bytes == 10 * KIB


def test_a_free_of_an_earlier_tensor_never_gives_a_negative_peak():
    held = [measure_peak(kib, 500).result]  # allocated under the profiler, so that its free is seen
    measured = measure_peak(held.clear)
    assert measured.peak_bytes == 0
    assert measured.final_bytes == -500 * KIB


def test_modules_and_repetition():
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    x = torch.randn(32, 64)
    with torch.no_grad():
        peaks = {measure_peak(model, x).peak_bytes for _ in range(3)}
    assert peaks == {2 * 32 * 256 * 4}


def test_an_error_in_the_call_comes_through():
    def call():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure_peak(call)
    assert measure_peak(kib, 1).peak_bytes == KIB


def test_trace_names_what_was_running():
    def call():
        with record_function("first"):
            x = torch.zeros(256)
        with record_function("second"):
            y = x.relu()
        return y

    result, events = allocator_trace(call)
    assert [event.delta_bytes for event in events] == [1024, 1024, -1024]
    assert events[0].within == ("first", "aten::zeros", "aten::empty")
    assert events[1].within == ("second", "aten::relu", "aten::clamp_min")
    assert events[2].within == ()
    assert sorted(event.time_ns for event in events) == [event.time_ns for event in events]
    assert result.numel() == 256


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda():
    x = torch.ones(1 << 20, device="cuda")
    measured = measure_peak(lambda x: (x + 1) * 2, x)
    assert measured.peak_bytes == 2 * x.nbytes
    assert measured.final_bytes == x.nbytes
