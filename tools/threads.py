"""Threads: streamed modules called, and planned, in several threads at once, held to what their models do.

    shapes   two threads with a new shape in each round
    beside   one thread plans while others run the model as it is, and another model
    rehash   two threads in generations of their own, which write to what they are given

Each prints the faults of all rounds; there should be none.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxstream
from fxstream.tools.bench import relative_l2

NEAR = 1e-6
"""Relative L2 between a streamed result and the model's, in float32."""

Worker = Callable[[list[str]], None]


class Block(nn.Module):
    """A wide middle between narrow ends."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm, self.narrow = nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.Conv2d(32, 8, 1)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.narrow(F.silu(self.norm(self.wide(x))))
        return found


class Denoiser(nn.Module):
    """What Step Rehash takes for a denoiser, of which a skipped step returns the last full one's result."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.eval().requires_grad_(False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        found: Tensor = self.fall(F.silu(self.rise(sample) + timestep / 1000))
        return found


def shapes(rounds: int) -> list[str]:
    """Faults where two threads bring a new shape in each round."""
    model = Block()
    streamed = fxstream.optimize(model, "min")

    def calls(rows: int) -> Worker:
        def work(faults: list[str]) -> None:
            for number in range(rounds):
                x = torch.randn(1, 8, rows, 8 + number)
                _compare("a new shape", streamed(x), model(x), faults)

        return work

    return _together([calls(8), calls(9)])


def beside(rounds: int) -> list[str]:
    """Faults where models run as they are while another thread plans one of them."""
    model, other, done = Block(), Block(), threading.Event()
    streamed, x = fxstream.optimize(model, "min"), torch.randn(2, 8, 16, 16)

    def plans(faults: list[str]) -> None:
        try:
            for number in range(rounds):
                shape = torch.randn(1, 8, 8, 8 + number)
                _compare("the planned call", streamed(shape), model(shape), faults)
        finally:
            done.set()

    def runs(module: nn.Module) -> Worker:
        expected = module(x)

        def work(faults: list[str]) -> None:
            while not done.is_set():
                _compare("a model as it is", module(x), expected, faults)
                if any(type(weight) is not nn.Parameter for weight in module.parameters()):
                    faults.append("a weight of a model is not its own")

        return work

    return _together([plans, runs(model), runs(other)])


def rehash(rounds: int) -> list[str]:
    """Faults where two threads generate, in steps of which two of three are skipped."""
    model = Denoiser()
    streamed = fxstream.optimize(model, "min", step_rehash=fxstream.StepRehash(key_steps=[0], cut="fall"))

    def generates(rows: int) -> Worker:
        def work(faults: list[str]) -> None:
            for number in range(rounds):
                latent = torch.randn(2, 4, rows, 8 + number % 5)
                expected = model(latent, torch.tensor(900.0))
                for time_ in (900.0, 800.0, 700.0):
                    found = streamed(latent, torch.tensor(time_))
                    _compare(f"the step at {time_:g}", found, expected, faults)
                    found.zero_()

        return work

    return _together([generates(8), generates(9)])


KINDS = {"shapes": shapes, "beside": beside, "rehash": rehash}


def _compare(what: str, found: Tensor, expected: Tensor, faults: list[str]) -> None:
    off = relative_l2(found, expected)
    if not off <= NEAR:
        faults.append(f"{what} is off by {off:.1e}")


def _together(workers: list[Worker]) -> list[str]:
    """Run each in a thread of its own; their faults."""
    faults: list[str] = []

    def guarded(worker: Worker) -> None:
        try:
            with torch.no_grad():
                worker(faults)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=guarded, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return faults


def main() -> int:
    """Run all kinds, and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.threads", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    found = 0
    for name, kind in KINDS.items():
        began = time.perf_counter()
        faults = kind(rounds)
        found += len(faults)
        print(f"{name}: {len(faults)} faults in {rounds} rounds, {time.perf_counter() - began:.0f} s")
        print(*(f"  {fault}\n" for fault in faults[:5]), sep="", end="", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    raise SystemExit(main())
