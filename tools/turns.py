"""Turns: ways to run one thing, each in a process of its own, timed one after the other.

What one way leaves behind, in an allocator or a cache, is then not another's: a heap that has grown for one would spare
the next its page faults. A machine that slows down slows all of them, and only ratios within a round are compared.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

AGAIN, ENOUGH = "again", "enough"
"""Requests to a way's process."""

Prepare = Callable[[str], tuple[Callable[[], Any], Any]]
"""In a way's process: its name -> what is timed, and facts about it."""


@dataclass
class Turn:
    """What a way's process told, and the seconds of its runs, one a round."""

    facts: Any
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Turn) -> float:
        """The median over rounds of its time over another's."""
        return median_ratio(self.seconds, other.seconds)


def median_ratio(seconds: Iterable[float], others: Iterable[float]) -> float:
    """The median over rounds of one way's time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def finish() -> None:
    """Wait until an accelerator has done what it was given: it may do so while the caller goes on."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def take_turns(prepare: Prepare, names: Sequence[str], rounds: int) -> dict[str, Turn]:
    """Prepare the ways in turn, each in a new process, then run them in turn as often as there are rounds."""
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    turns: dict[str, Turn] = {}
    for name in names:
        print(name, file=sys.stderr, flush=True)
        pipes[name], other = context.Pipe()
        context.Process(target=_serve, args=(prepare, name, other), daemon=True).start()
        other.close()  # so that a process that fails is the end of the pipe
        turns[name] = Turn(pipes[name].recv())
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, pipe in pipes.items():
            pipe.send(AGAIN)
            turns[name].seconds.append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(ENOUGH)
    return turns


def _serve(prepare: Prepare, name: str, pipe: Connection) -> None:
    run, facts = prepare(name)
    pipe.send(facts)
    while pipe.recv() == AGAIN:
        began = time.perf_counter()
        run()
        finish()
        pipe.send(time.perf_counter() - began)
