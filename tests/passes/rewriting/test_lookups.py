"""Lookups: tables of which rows are read stay at home, others are weights like all."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.liveness import profile
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.offload import offload
from fxstream.passes.rewriting.lookups import look_up
from fxstream.tools.measure import measure_peak

INDICES = torch.randint(64, (6, 4), generator=torch.Generator().manual_seed(0))


class Words(nn.Module):
    def __init__(self, **kind):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(64, 32, **kind)
        self.wide, self.narrow = nn.Linear(32, 96), nn.Linear(96, 32)

    def forward(self, indices):
        x = self.table(indices)
        return x + self.narrow(self.wide(x).relu())


class Tied(Words):
    def forward(self, indices):
        return F.linear(super().forward(indices), self.table.weight)


class Twice(Words):
    def forward(self, indices):
        return super().forward(indices) + self.table(indices.flip(0))


class Most(Words):
    def forward(self, indices):
        return super().forward(indices.repeat(3, 1))


def normalized(model):
    return normalize(capture(model.eval(), (INDICES,)).graph_module)


@pytest.mark.parametrize(("model", "reads"), [(Words, 1), (Twice, 2)])
def test_rows_are_read_at_home(model, reads):
    model = model(padding_idx=3).requires_grad_(False)
    graph_module = normalized(model)
    changed, lookups = look_up(graph_module)
    assert [(lookup.name, lookup.bytes) for lookup in lookups] == [("model.table.weight", 6 * 4 * 32 * 4)] * reads
    assert profile(graph_module).weight_bytes - profile(changed).weight_bytes == 64 * 32 * 4
    assert torch.equal(changed(INDICES)[0], model(INDICES))


@pytest.mark.parametrize("model", [Tied, Most])
def test_what_else_reads_a_table_or_all_of_it_keeps_it(model):
    graph_module = normalized(model())
    assert look_up(graph_module) == (graph_module, ())


def test_a_table_that_must_stay():
    graph_module = normalized(Words())
    assert look_up(graph_module, {"model.table.weight"}) == (graph_module, ())


def test_a_table_that_is_written_to_stays():
    graph_module = normalized(Words(max_norm=1.0))
    assert look_up(graph_module)[1] == ()


@pytest.mark.parametrize("limit", [None, 40_000])
def test_lookups_within_loops(limit):
    model = Words().requires_grad_(False)
    graph_module = normalized(model)
    block, homes = offload(graph_module, limit)
    assert homes.lookups and homes.peak_bytes == block.after.peak_bytes + block.after.weight_bytes
    with torch.no_grad():
        measured = measure_peak(block.graph_module, INDICES)
    assert (measured.result[0] - model(INDICES)).norm() <= 1e-6 * measured.result[0].norm()
    assert measured.peak_bytes == block.after.peak_bytes
