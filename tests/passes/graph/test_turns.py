"""One thread's capture is not seen by another's calls."""

import threading

import torch
from torch import Tensor, nn

from fxstream.passes.graph.capture import capture


class Asks(nn.Module):
    """Adds one where torch says that it traces, and does enough that another thread runs beside its capture."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(20):
            x = self.linear(x).relu()
        if torch.compiler.is_exporting() and torch.compiler.is_compiling():
            return x + 1
        return x


@torch.compiler.disable
def untraced(x: Tensor) -> tuple[bool, bool]:
    return torch.compiler.is_exporting(), torch.compiler.is_compiling()


def test_other_threads_are_not_told_of_a_capture():
    stop, found = threading.Event(), []

    def calls() -> None:
        try:
            while not stop.is_set():
                found.append(untraced(torch.zeros(2)))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=calls) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            captured = capture(Asks(), (torch.randn(2, 4),))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(found) == {(False, False)}
    assert sum(node.target is torch.ops.aten.add.Tensor for node in captured.graph_module.graph.nodes) == 1
