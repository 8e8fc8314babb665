"""Lookups: rows of a table from its file, as ``torch.embedding`` takes them from memory."""

import pytest
import torch

from fxstream.runtime.lookup import lookup
from fxstream.runtime.release import release
from fxstream.runtime.spill import spill
from fxstream.tools.measure import measure_peak


@pytest.fixture
def table():
    made = torch.randn(5000, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    spill([made])
    return made


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_rows(table, shape):
    indices = torch.randint(5000, shape, generator=torch.Generator().manual_seed(1))
    found = lookup(table, indices)
    assert torch.equal(found, torch.embedding(table, indices))
    assert (found.dtype, found.stride()) == (table.dtype, torch.embedding(table, indices).stride())


def test_it_holds_the_rows_alone(table):
    indices = torch.arange(40)
    release([table])
    assert measure_peak(lookup, table, indices).peak_bytes == 40 * 600


def test_a_table_in_memory_or_changed_there_is_read_there(tmp_path):
    torch.save(torch.randn(2000, 64), tmp_path / "table.pt")
    mapped, indices = torch.load(tmp_path / "table.pt", mmap=True), torch.tensor([3, 1999])
    assert torch.equal(lookup(mapped.clone(), indices), mapped[indices])
    mapped[3] = 7.0
    assert (lookup(mapped, indices)[0] == 7.0).all()


@pytest.mark.parametrize("index", [-1, 5000])
def test_what_is_no_row(table, index):
    with pytest.raises(IndexError, match=f"index {index} is out of range of a table of 5000 rows"):
        lookup(table, torch.tensor([0, index]))
