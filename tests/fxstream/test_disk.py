"""``offload="disk"``: budgets below the weights, held against eager, the allocator's events and resident memory."""

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fxstream
from fxstream.budget import format_bytes
from fxstream.passes.machine.allocations import ALIGNMENT
from fxstream.runtime.files import region_of
from fxstream.tools import catalogue
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak


class Deep(nn.Module):
    def __init__(self, depth=6, width=128):
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.requires_grad_(False).eval()

    def forward(self, x):
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(wide(x).relu())
        return x


X = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0))
MIB = 1 << 20


def held(plan):
    return plan.peak_bytes + plan.after.weight_bytes + plan.input_bytes


@pytest.mark.parametrize("budget", ["min", "1MiB", MIB, 0.5, 0.9])
def test_the_model_s_output_within_the_budget(budget, tmp_path):
    model, x = Deep(), X
    if budget == "min":
        model, x = Deep(2, 32), X[:, :, :32]
    expected = model(x)
    streamed = fxstream.optimize(model, budget, (x,), offload=f"disk:{tmp_path}")
    (plan,) = streamed.plans
    measured = measure_peak(streamed, x)
    assert relative_l2(measured.result, expected) <= 1e-6
    assert abs(measured.peak_bytes - plan.peak_bytes) < ALIGNMENT
    assert streamed.plans == (plan,)
    assert plan.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert plan.moved_bytes >= plan.weight_bytes - plan.after.weight_bytes > 0
    if isinstance(budget, float):
        assert plan.peak_bytes + plan.after.weight_bytes <= budget * (plan.before.peak_bytes + plan.weight_bytes)
    elif budget != "min":
        assert held(plan) <= MIB
    assert f"a call reads {format_bytes(plan.moved_bytes)}" in str(plan)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "dtype"), [("wan-transformer", torch.float32), ("sd-vae", torch.float64)])
def test_models_of_diffusers(name, dtype):
    """Halfway between the least that can be and all weights beside it."""
    call, args, kwargs = catalogue.small(catalogue.shallow(name), frames=3, height=8, width=12, dtype=dtype)
    lowest = fxstream.plan(call, args, kwargs, offload="disk")
    budget = held(lowest) + lowest.weight_bytes // 2
    with torch.no_grad():
        expected = call(*args, **kwargs)[0]
        streamed = fxstream.optimize(call, budget, args, kwargs, offload="disk")
        (plan,) = streamed.plans
        measured = measure_peak(streamed, *args, **kwargs)
    assert lowest.fetched
    assert plan.moved_bytes < lowest.moved_bytes
    assert held(plan) <= budget
    assert abs(measured.peak_bytes - plan.peak_bytes) <= 0.01 * plan.peak_bytes
    assert relative_l2(measured.result[0], expected) <= 1e-6


def test_what_is_moved_leaves_memory_at_once():
    model = Deep()
    before = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    streamed = fxstream.optimize(model, "1MiB", (X,), offload="disk")
    gone = sum(storage() is None for storage in before)
    assert gone == len({weight.name for weight in streamed.plans[0].fetched}) > 0


def test_below_the_lowest_nothing_is_changed():
    model = Deep()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(fxstream.MemoryBudgetError, match=r"for weights, inputs and activations.*fetch") as caught:
        fxstream.optimize(model, "100KiB", (X,), offload="disk")
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    lowest = caught.value.lowest_bytes
    streamed = fxstream.optimize(model, lowest, (X,), offload="disk")
    assert held(streamed.plans[0]) == lowest


def test_planning_changes_nothing():
    model = Deep()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    plan = fxstream.plan(model, (X,), memory_budget="min", offload="disk")
    assert plan.fetched
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    assert fxstream.plan(model.to("meta"), (X.to("meta"),), offload="disk").fetched == plan.fetched


def test_without_it_the_error_says_that_it_could():
    with pytest.raises(fxstream.MemoryBudgetError, match='offload="disk"'):
        fxstream.optimize(Deep(), "1MiB", (X,))


def test_a_folder_without_room_leaves_the_model_alone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    model = Deep()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"\d+ bytes can't be spilled to .*: No space left on device"):
        fxstream.optimize(model, "min", (X,), offload=f"disk:{tmp_path}")
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]
    monkeypatch.undo()
    streamed = fxstream.optimize(model, "min", (X,), offload=f"disk:{tmp_path}")
    assert relative_l2(streamed(X), model(X)) <= 1e-6


def test_what_else_lies_in_a_weight_s_memory_keeps_it_there():
    """A view that the model holds beside its parameters sees what is written to them, as before."""
    model = Deep()
    model.corner = model.wide[0].weight.data[:2]
    streamed = fxstream.optimize(model, "1MiB", (X,), offload="disk")
    names = {weight.name for weight in streamed.plans[0].fetched}
    assert names and "model.wide.0.weight" not in names
    with pytest.raises(fxstream.MemoryBudgetError, match=r"1 of the weights stay, such as wide\.0\.weight"):
        fxstream.optimize(model, "100KiB", (X,), offload="disk")
    model.wide[0].weight.data.fill_(3)
    assert (model.corner == 3).all()
    assert relative_l2(streamed(X), model(X)) <= 1e-6


def test_where_all_weights_stay_the_error_counts_them():
    model = Deep()
    state = model.state_dict()
    with pytest.raises(fxstream.MemoryBudgetError, match=r"24 of the weights stay") as caught:
        fxstream.optimize(model, "1MiB", (X,), offload="disk")
    assert caught.value.lowest_bytes > sum(tensor.nbytes for tensor in state.values())


class TestWeightsThatChange:
    @pytest.fixture
    def streamed(self):
        model = Deep()
        return model, fxstream.optimize(model, "1MiB", (X,), offload="disk")

    def test_in_place(self, streamed):
        model, module = streamed
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert relative_l2(module(X), model(X)) <= 1e-6
        assert len(module.plans) == 1

    def test_loaded(self, streamed):
        model, module = streamed
        module.load_state_dict(Deep().state_dict())
        assert relative_l2(module(X), model(X)) <= 1e-6

    def test_replaced(self, streamed):
        model, module = streamed
        model.wide[2] = nn.Linear(128, 512).requires_grad_(False)
        model.narrow[1].weight.data = torch.randn(128, 512)
        assert relative_l2(module(X), model(X)) <= 1e-6

    def test_another_shape_shares_the_file(self, streamed):
        model, module = streamed
        before = {id(parameter): parameter.data_ptr() for parameter in model.parameters() if region_of(parameter)}
        module(X[:, :2])
        assert len(module.plans) == 2
        assert before == {id(p): p.data_ptr() for p in model.parameters() if id(p) in before}

    def test_the_state_dict_is_the_model_s(self, streamed):
        model, module = streamed
        torch.manual_seed(0)
        saved = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        del module
        gc.collect()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_mapped_is_read_from_its_own_file(tmp_path):
    """And a change of it, which is in no file, is seen."""
    torch.save(Deep().state_dict(), tmp_path / "deep.pt")
    with torch.device("meta"):
        model = Deep()
    model.load_state_dict(torch.load(tmp_path / "deep.pt", mmap=True), assign=True)
    model.requires_grad_(False)
    streamed = fxstream.optimize(model, "1MiB", (X,), offload=f"disk:{tmp_path}")
    assert relative_l2(streamed(X), model(X)) <= 1e-6
    for parameter in model.parameters():
        assert os.path.samefile(region_of(parameter).file.path, tmp_path / "deep.pt")
    model.wide[3].weight[5, 7] = 100
    assert relative_l2(streamed(X), model(X)) <= 1e-6
    os.truncate(tmp_path / "deep.pt", 65536)
    with pytest.raises(OSError, match=r"deep\.pt has 65536 bytes, and its weights took \d+"):
        streamed(X)


@pytest.mark.parametrize(
    ("offload", "said"),
    [
        ("cloud", "can't be read"),
        ("disk:", "can't be read"),
        (7, "can't be read"),
        ("disk:/nowhere/at/all", "there is no folder /nowhere/at/all"),
        ("host", "not there yet"),
    ],
)
def test_what_it_may_be(offload, said):
    with pytest.raises(ValueError, match=said):
        fxstream.optimize(Deep(), "min", offload=offload)
    with pytest.raises(ValueError, match=said):
        fxstream.plan(Deep(), (X,), offload=offload)


def test_what_it_does_not_go_with():
    rehash = fxstream.StepRehash(key_steps=[0], cut="wide.0")
    with pytest.raises(ValueError, match="Step Rehash"):
        fxstream.optimize(Deep(), "min", offload="disk", step_rehash=rehash)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled(compiler):
    model = Deep()
    streamed = fxstream.optimize(model, "1MiB", (X,), offload="disk", compile=compiler)
    assert relative_l2(streamed(X), model(X)) <= 1e-6
    assert measure_peak(streamed, X).peak_bytes <= streamed.plans[0].peak_bytes
    assert relative_l2(torch.compile(streamed, backend=compiler)(X), model(X)) <= 1e-6


class Picture(nn.Module):
    """What a decoder is: few weights, and activations of which two are more than the budget."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.rise, self.out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(4, width)
        self.requires_grad_(False).eval()

    def forward(self, x):
        skip = x = self.rise(x)
        for conv in self.convs:
            x = conv(torch.nn.functional.silu(self.norm(x)))
        return self.out(x + skip)


@pytest.fixture(scope="module")
def made():
    """4 MiB an activation: slices alone come to 8 MiB."""
    model, x = Picture(), torch.randn(1, 3, 128, 256, generator=torch.Generator().manual_seed(0))
    return model, x, fxstream.optimize(model, "5MiB", (x,), offload="disk")


class TestActivations:
    def test_the_model_s_output_within_the_budget(self, made):
        model, x, streamed = made
        (plan,) = streamed.plans
        measured = measure_peak(streamed, x)
        assert fxstream.plan(model, (x,)).peak_bytes >= 8 * MIB
        assert held(plan) <= 5 * MIB
        assert measured.peak_bytes <= plan.peak_bytes
        assert relative_l2(measured.result, model(x)) <= 1e-6
        assert plan.spilled and plan.moved_bytes >= 2 * sum(value.bytes for value in plan.spilled)
        assert f"Activations on disk: {len(plan.spilled)} of " in str(plan)

    def test_no_file_is_left(self, made):
        _, x, streamed = made
        before = len(os.listdir("/proc/self/fd"))
        streamed(x)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_disk_that_is_full_meanwhile(self, made, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        model, x, streamed = made
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"\d+ bytes can't be spilled to .*: No space left on device"):
            streamed(x)
        monkeypatch.undo()
        assert relative_l2(streamed(x), model(x)) <= 1e-6

    def test_in_several_threads(self, made):
        model, x, streamed = made
        inputs = [x * scale for scale in (1.0, 2.0, -1.0, 0.5)]
        with ThreadPoolExecutor(4) as threads, torch.no_grad():
            found = list(threads.map(streamed, inputs))
        assert all(relative_l2(a, model(b)) <= 1e-6 for a, b in zip(found, inputs, strict=True))

    @pytest.mark.parametrize("compiler", ["aot_eager"])
    def test_compiled(self, made, compiler):
        model, x, _ = made
        streamed = fxstream.optimize(model, "5MiB", (x,), offload="disk", compile=compiler)
        assert streamed.plans[0].spilled
        assert relative_l2(streamed(x), model(x)) <= 1e-6

    def test_below_what_files_can_do(self, made):
        model, x, _ = made
        with pytest.raises(fxstream.MemoryBudgetError) as caught:
            fxstream.optimize(model, "600KiB", (x,), offload="disk")
        assert caught.value.lowest_bytes < 5 * MIB
        assert caught.value.plan.spilled


RESIDENT = """
import resource, sys, torch
import fxstream
from tests.fxstream.test_disk import Deep

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

with torch.device("meta"):
    model, x = Deep(12, 1024), torch.empty(1, 8, 1024)
model.load_state_dict(torch.load(sys.argv[1], mmap=True), assign=True)
model.requires_grad_(False)
x = torch.ones(1, 8, 1024)
small = Deep(2, 64)
fxstream.optimize(small, "min", (torch.ones(1, 8, 64),), offload="disk")(torch.ones(1, 8, 64))
streamed = fxstream.optimize(model, "64MiB", (x,), offload="disk")
before = most()
found = streamed(x)
print(most() - before, streamed.plans[0].weight_bytes)
"""


def test_resident_memory_of_a_process_of_its_own(tmp_path):
    """384 MiB of weights in a mapped file, run in 64 MiB: what is read is never mapped into memory as a whole."""
    torch.save(Deep(12, 1024).state_dict(), tmp_path / "deep.pt")
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "deep.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 384 * MIB
    assert grown < 72 * MIB


SPILLED = """
import sys, torch
import fxstream
from fxstream.tools.measure import WatchedMemory
from tests.fxstream.test_disk import Picture

torch.set_num_threads(1)
model, x = Picture(), torch.ones(1, 3, 1024, 512)
streamed = fxstream.optimize(model, "48MiB", (x,), offload="disk:" + sys.argv[1])
model(torch.ones(1, 3, 64, 64))
memory = WatchedMemory(limit=64.0)
memory.look()
before = memory.resident
memory.start()
found = streamed(x)
grown = memory.resident - before
print(grown, sum(value.bytes for value in streamed.plans[0].spilled), float((found - model(x)).norm() / found.norm()))
"""


def test_resident_memory_of_a_process_with_activations_in_files(tmp_path):
    """64 MiB an activation, run in 48 MiB: of what is mapped a slice's windows are resident, and given back."""
    command = [sys.executable, "-c", SPILLED, str(tmp_path)]
    given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is the system's at once
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=given_back)
    grown, spilled, off = map(float, done.stdout.split())
    assert spilled >= 128 * MIB
    assert off <= 1e-6
    assert grown * 1024 < 48
