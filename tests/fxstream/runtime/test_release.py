"""Releasing: mapped memory given back, and nothing that was written lost."""

import re

import torch

from fxstream.runtime.release import release
from fxstream.runtime.spill import spill


def resident(tensor):
    """Bytes of a tensor's mapping that are in this process's memory."""
    found = 0
    with open("/proc/self/smaps") as file:
        inside = False
        for line in file:
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if bounds:
                inside = int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16)
            elif inside and line.startswith("Rss:"):
                found = int(line.split()[1]) * 1024
    return found


def test_spilled_memory_is_given_back_and_read_again():
    tensor = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    expected = tensor.clone()
    spill([tensor])
    assert resident(tensor) == 0
    tensor.mul_(2)
    assert resident(tensor) == tensor.nbytes
    release([tensor])
    assert resident(tensor) == 0
    assert torch.equal(tensor, expected * 2)


def test_what_is_written_to_private_memory_stays(tmp_path):
    torch.save({"a": torch.zeros(1 << 20), "b": torch.ones(1 << 20)}, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", mmap=True)
    loaded["a"][5] = 3.0
    assert float(loaded["a"].sum() + loaded["b"].sum()) == 3.0 + (1 << 20)
    before = resident(loaded["b"])
    release(loaded.values())
    assert before - resident(loaded["b"]) >= loaded["b"].nbytes - 8192
    assert float(loaded["a"].sum() + loaded["b"].sum()) == 3.0 + (1 << 20)


def test_memory_that_is_no_file_s_is_left_alone():
    tensor = torch.ones(1 << 20)
    release([tensor])
    assert bool((tensor == 1).all())
