import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import fxstream
from fxstream.budget import Budget, format_bytes

KIB, MIB, GIB, TIB = (1024**power for power in (1, 2, 3, 4))


@pytest.mark.parametrize(
    ("text", "total_bytes"),
    [
        ("6GiB", 6 * GIB),
        ("6 GiB", 6 * GIB),
        (" 6gib ", 6 * GIB),
        ("800MB", 800_000_000),
        ("800 mb", 800_000_000),
        ("1.5GiB", 3 * GIB // 2),
        ("0.5 KiB", 512),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * TIB),
        ("1000B", 1000),
        ("007MiB", 7 * MIB),
    ],
)
def test_sizes_in_words(text, total_bytes):
    assert Budget.parse(text) == Budget(total_bytes=total_bytes)


@pytest.mark.parametrize("text", ["min", "MIN", " min "])
def test_the_lowest(text):
    assert Budget.parse(text) == Budget()


@given(st.integers(1, 2**60))
def test_an_int_is_bytes(total_bytes):
    assert Budget.parse(total_bytes) == Budget(total_bytes=total_bytes)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_float_is_a_share(share):
    assert Budget.parse(share) == Budget(share=share)


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(["B", "KB", "KiB", "MB", "MiB", "GB", "GiB", "TiB"]))
@example(0, 1, "GiB")
def test_decimals_are_read_to_the_byte(whole, thousandths, unit):
    prefix = unit.rstrip("B")
    base = 1024 if prefix.endswith("i") else 1000
    factor = base ** "KMGT".find(prefix[0]) * base if prefix else 1
    size = int((whole + Fraction(thousandths, 1000)) * factor)
    text = f"{whole}.{thousandths:03}{unit}"
    if size == 0:
        with pytest.raises(ValueError, match="memory_budget"):
            Budget.parse(text)
    else:
        assert Budget.parse(text).total_bytes == size


@pytest.mark.parametrize(
    "budget",
    [
        *("6 potatoes", "", "GiB", "6", "six GiB", "-6GiB", "+6GiB", "6GiB!", "6,5GiB", "1e9B", "6 G i B", "6EiB"),
        *("0GiB", "0B", "0.0MB", "0.1B", "minimum", "0.5", "nan", "infGiB", "٦GiB"),
        *(0, -1, 0.0, 1.0, 1.5, -0.5, math.nan, math.inf, -math.inf),
        *(None, True, False, b"6GiB", [6], (1, 2), 1j, Fraction(1, 2), torch.tensor(0.5)),
    ],
)
def test_anything_else_is_refused_with_the_forms_there_are(budget):
    with pytest.raises(ValueError, match="memory_budget") as raised:
        Budget.parse(budget)
    message = str(raised.value)
    assert repr(budget) in message
    assert all(form in message for form in ('"6GiB"', "int", "float in (0, 1)", '"min"'))


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    try:
        budget = Budget.parse(text)
    except ValueError:
        return
    assert budget == Budget() or budget.total_bytes > 0


def test_the_account():
    peak, held = 1000, 300
    assert Budget.parse(900).activation_bytes(peak, held) == 600  # an int is for weights and inputs too
    assert Budget.parse(200).activation_bytes(peak, held) == -100
    assert Budget.parse(0.25).activation_bytes(peak, held) == 250  # a share is of the activations alone
    assert Budget.parse("min").activation_bytes(peak, held) is None


def test_refused_before_anything_else():
    """Before capture, which takes long: the model here can't even be called."""
    for call in (
        lambda budget: fxstream.optimize(torch.nn.Module(), memory_budget=budget, example_args=()),
        lambda budget: fxstream.plan(torch.nn.Module(), (), memory_budget=budget),
    ):
        with pytest.raises(ValueError, match="6 potatoes"):
            call("6 potatoes")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (-1536, "-1.50 KiB"),
        (3 * MIB, "3.00 MiB"),
        (3.27 * GIB, "3.27 GiB"),
        (5 * TIB, "5120.00 GiB"),
    ],
)
def test_bytes_for_people(size, text):
    assert format_bytes(size) == text


def test_numbers_of_numpy():
    assert Budget.parse(np.int64(6 * GIB)) == Budget.parse(6 * GIB)
    assert Budget.parse(np.float32(0.5)) == Budget.parse(0.5)
    with pytest.raises(ValueError, match="can't be read"):
        Budget.parse(np.bool_(True))
