"""Where tensors lie, and how they get there and back: mapped files, spilling, fetching."""

import gc
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxstream.runtime import spill as spilling
from fxstream.runtime.fetch import fetch, fetched
from fxstream.runtime.files import locate, region_of
from fxstream.runtime.release import give_back
from fxstream.runtime.spill import empty_at_home, files_reused, send_home, spill, write_home


def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(300, 70),
        "b": torch.randn(40, 1000).bfloat16().t(),
        "c": torch.arange(7),
        "d": torch.ones(3, dtype=torch.bool),
    }


def of_safetensors(folder):
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, folder / "x.safetensors")
    return load_file(folder / "x.safetensors"), folder / "x.safetensors"


def of_torch(folder):
    torch.save(tensors(), folder / "x.pt")
    return torch.load(folder / "x.pt", mmap=True), folder / "x.pt"


@pytest.mark.parametrize("load", [of_safetensors, of_torch])
class TestMapped:
    def test_the_file_has_the_bytes_of_the_tensor(self, load, tmp_path):
        loaded, path = load(tmp_path)
        locate(loaded.values())
        for tensor in loaded.values():
            region = region_of(tensor)
            assert os.path.samefile(region.file.path, path)
            flat = tensor.t().contiguous() if not tensor.is_contiguous() else tensor
            content = bytes(flat.view(torch.uint8).flatten().tolist())
            file = os.pread(region.file.descriptor, len(content), region.offset_of(tensor.data_ptr()))
            assert file == content
            assert not region.is_changed(tensor.data_ptr(), len(content))

    def test_what_is_fetched_is_the_tensor_as_it_is_now(self, load, tmp_path):
        loaded, _ = load(tmp_path)
        for tensor in loaded.values():
            found = fetched(fetch(tensor))
            assert torch.equal(found, tensor) and found.stride() == tensor.stride()
            assert found.data_ptr() != tensor.data_ptr()
            tensor.view(-1)[-1:].zero_() if tensor.is_contiguous() else tensor.mul_(2)
            assert torch.equal(fetched(fetch(tensor)), tensor)

    def test_a_file_that_is_shortened(self, load, tmp_path):
        loaded, path = load(tmp_path)
        region_of(loaded["a"])
        os.truncate(path, 4096)
        with pytest.raises(OSError, match=r"no more bytes at 4096, where \d+ of a weight's 84000 are left"):
            fetched(fetch(loaded["a"]))

    def test_a_file_that_is_replaced_is_read_as_it_was(self, load, tmp_path):
        loaded, path = load(tmp_path)
        other = tmp_path / "other"
        other.write_bytes(b"another")
        other.replace(path)
        assert torch.equal(fetched(fetch(loaded["a"])), tensors()["a"])


def test_what_is_in_memory_alone_is_copied_from_there():
    tensor = torch.randn(5, 7)
    assert region_of(tensor) is None
    assert torch.equal(fetched(fetch(tensor)), tensor)


class TestSpilling:
    def test_tensors_are_as_they_were_in_a_file_without_a_name(self, tmp_path):
        known, parameter = tensors(), torch.nn.Parameter(torch.randn(64, 64))
        view = parameter.data[3:5, 7:]
        whole, part = parameter.detach().clone(), view.clone()
        spill([*known.values(), parameter, view], str(tmp_path))
        assert os.listdir(tmp_path) == []
        for name, tensor in tensors().items():
            assert torch.equal(known[name], tensor) and known[name].stride() == tensor.stride()
            assert region_of(known[name]) is not None
        assert torch.equal(parameter, whole) and isinstance(parameter, torch.nn.Parameter)
        assert torch.equal(view, part)
        parameter.data[3, 7] = 5
        assert view[0, 0] == 5
        assert fetched(fetch(parameter))[3, 7] == 5

    def test_the_file_is_gone_with_the_last_tensor(self, tmp_path):
        one, two = torch.randn(9), torch.randn(9)
        spill([one, two], str(tmp_path))
        descriptor = region_of(one).file.descriptor
        del one
        gc.collect()
        os.fstat(descriptor)
        del two
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

    def test_a_folder_that_has_no_room_leaves_tensors_alone(self, tmp_path):
        tensor = torch.ones(9)
        address = tensor.data_ptr()
        with pytest.raises(OSError, match=r"4096 bytes can't be spilled to .*nowhere: No such file"):
            spill([tensor], str(tmp_path / "nowhere"))
        assert tensor.data_ptr() == address

    def test_storages_of_nothing(self):
        tensor = torch.empty(0, 3)
        spill([tensor])
        assert tensor.shape == (0, 3)


def test_a_forked_process_reads_by_itself():
    """The reader's thread is not there after a fork."""
    code = """
import os, torch
from fxstream.runtime import spill as spilling
from fxstream.runtime.fetch import fetch, fetched
x = torch.ones(4)
fetched(fetch(x))
child = os.fork()
if not child:
    os._exit(int(fetched(fetch(x)).sum()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "4\n"


class TestMadeAtHome:
    @pytest.mark.parametrize("stride", [(70, 1), (1, 300)])
    def test_a_tensor_in_a_file(self, stride, tmp_path):
        made = empty_at_home((300, 70), stride, torch.bfloat16, str(tmp_path))
        assert (made.shape, made.stride(), made.dtype) == ((300, 70), stride, torch.bfloat16)
        made.fill_(3)
        assert region_of(made) is not None
        give_back(made)
        assert bool((made == 3).all())
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("name", ["a", "b", "c", "d"])
    def test_a_tensor_that_is_sent_there(self, name):
        tensor = tensors()[name]
        sent = send_home(tensor, "")
        assert torch.equal(sent, tensor)
        assert sent.stride() == tensor.stride()
        assert region_of(sent) is not None

    @pytest.mark.parametrize("dim", [0, 1, 2])
    @pytest.mark.parametrize("crop", [0, 3])
    def test_a_window_is_written_by_way_of_the_file(self, dim, crop):
        """What a slice makes, which may be a part of a larger tensor, without a page of the window in memory."""
        made = empty_at_home((4, 64, 2048), (64 * 2048, 2048, 1), torch.float32)
        made.zero_()
        whole = torch.randn(4, 64, 2048)
        length = made.shape[dim] // 2
        larger = torch.cat([whole.narrow(dim, 0, length), torch.ones_like(whole.narrow(dim, 0, crop))], dim)
        part = larger.narrow(dim, 0, length)
        assert write_home(made.narrow(dim, 1, length), part)
        assert torch.equal(made.narrow(dim, 1, length), part)
        assert made.count_nonzero() == part.count_nonzero()

    def test_what_the_system_does_not_write_at_once_is_written_on(self, monkeypatch):
        monkeypatch.setattr(spilling, "MOST_AT_ONCE", 1000)
        made, part = empty_at_home((4, 4096), (4096, 1), torch.float32), torch.randn(2, 4096)
        assert write_home(made[1:3], part)
        assert torch.equal(made[1:3], part)
        assert torch.equal(send_home(part, ""), part)

    def test_a_window_of_stretches_shorter_than_a_page_is_not(self):
        made = empty_at_home((64, 2048), (2048, 1), torch.float32)
        assert not write_home(made[:, :8], torch.ones(64, 8))
        assert not write_home(made[:2], torch.ones(2048, 2).t())
        assert not write_home(torch.ones(64, 2048), torch.ones(64, 2048))

    def test_files_serve_again_within_a_call(self):
        with files_reused():
            first = empty_at_home((1000,), (1,), torch.float32)
            second = empty_at_home((1000,), (1,), torch.float32)
            file, address = region_of(first).file, first.data_ptr()
            assert region_of(second).file is not file
            del first
            gc.collect()
            third = empty_at_home((900,), (1,), torch.float32)
            assert third.data_ptr() == address
            smaller = empty_at_home((10,), (1,), torch.float32)
        assert len({x.data_ptr() for x in (second, third, smaller)}) == 3

    def test_and_are_closed_at_its_end(self):
        open_before = len(os.listdir("/proc/self/fd"))
        with files_reused():
            for size in (1000, 5000, 100_000):
                empty_at_home((size,), (1,), torch.float32).fill_(1)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == open_before

    def test_a_folder_that_can_take_none(self, tmp_path):
        with pytest.raises(OSError, match=r"4000 bytes can't be spilled to .*nowhere"):
            empty_at_home((1000,), (1,), torch.float32, str(tmp_path / "nowhere"))
