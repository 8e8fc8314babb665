"""Generators: which of them a forward draws from, seen while it is traced.

A graph draws from torch's default generators, from those that a call is given and from those that a model keeps. What
else a forward does with generators happens while it is traced and never again, so it is refused: seeding one, reading
its state, making one, drawing from Python's or numpy's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from threading import get_ident
from types import FrameType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxstream.passes.graph.known import out_of_sight

Generator = torch.Generator

_MARK = 0x66787374 << 32
"""Begins the seeds of the generators that stand for others in a trace, before their numbers."""


class DrawError(RuntimeError):
    """A forward does with generators what a graph can't."""

    advice = "Draw from torch's generators alone, and make and seed them outside of the model."


class Generators(TorchFunctionMode):
    """Follows the generators of a call and those that a model keeps through a trace, and refuses all others.

    ``given`` are those of the call, in whose place the trace has those of ``traced``; ``kept`` are those that the model
    holds. While it is entered both have seeds by which it is seen whether forward seeds them.
    """

    def __init__(self, given: Sequence[Generator], kept: Iterable[Any]) -> None:
        super().__init__()
        firsts = [next(at for at, other in enumerate(given) if other is generator) for generator in given]
        stand_ins = [Generator(generator.device) for generator in given]
        self.traced = [stand_ins[first] for first in firsts]
        self._places = len(given)
        self._known = [*self.traced, *(each for each in kept if _is_own(each)), *_defaults()]
        self._watched = [*set(firsts), *range(self._places, len(self._known) - len(_defaults()))]
        self._seeds: dict[int, int] = {}
        self._draws = count()
        self._drawn: dict[int, Generator] = {}
        self._undone = ExitStack()

    def __enter__(self) -> Generators:
        self._undone.enter_context(_seeding_refused())
        for number in self._watched:
            self._undone.callback(self._known[number].set_state, self._known[number].get_state())
            self._seed(number)
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        with self._undone:
            if error is None:
                self._check()

    def _seed(self, number: int) -> None:
        """Give a generator a seed that no forward gives it."""
        self._seeds[number] = self._known[number].manual_seed(_MARK + (1 << 31) + next(self._draws)).initial_seed()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.random_ and (len(args) > 2 or "to" in kwargs):
            raise DrawError("random_(from, to) can't be written in a graph: use torch.randint")
        if any(isinstance(value, Generator) for value in (*args, *kwargs.values())):
            args, kwargs = pytree.tree_map_only(Generator, self._drawn_from, (args, kwargs))
        return function(*args, **kwargs)

    def _drawn_from(self, generator: Generator) -> Generator:
        """What a draw has for a generator in the graph."""
        number = next((at for at, known in enumerate(self._known) if known is generator), None)
        if number is None:
            raise DrawError(
                "forward draws from a generator that it makes, or that is kept where it can't be seen: pass it to the "
                "call, or keep it as an attribute of the model"
            )
        self._check()
        if number in self._seeds:
            self._seed(number)  # as a draw would move it: a state from before is another
        if number not in self._drawn:
            self._drawn[number] = Generator(generator.device).manual_seed(_MARK + number)
        return self._drawn[number]

    def _check(self) -> None:
        for number, seed in self._seeds.items():
            if self._known[number].initial_seed() != seed:
                raise DrawError("forward seeds a generator that it is given or that the model keeps, or sets its state")

    def source(self, drawn: Generator) -> tuple[int | None, Generator]:
        """What a generator of the graph (or a copy of it) is: its place in the call, if it has one, or itself."""
        number = drawn.initial_seed() - _MARK
        return (number if number < self._places else None), self._known[number]


@contextmanager
def _seeding_refused() -> Iterator[None]:
    """Let torch's functions that seed its default generator, or set or read its state, raise in this thread."""
    real, thread = torch.random.default_generator, get_ident()

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            if get_ident() == thread and not _is_torchs(sys._getframe(1)):
                raise DrawError(f"forward seeds torch's generator, or sets or reads its state ({name})")
            return getattr(real, name)

    torch.random.default_generator = Refusing()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.random.default_generator = real


def _is_torchs(frame: FrameType | None) -> bool:
    """Whether torch itself called its functions for random numbers, from this frame on."""
    while frame is not None and frame.f_code.co_filename.endswith(_BETWEEN):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_TORCH)


_TORCH = os.path.dirname(torch.__file__)
_BETWEEN = ("torch/random.py", "torch/_compile.py", "torch/_dynamo/eval_frame.py", contextlib.__file__)
"""Files with frames between a call of torch's functions for random numbers and what they do."""


class States:
    """The states of generators that other threads may use as well, or that aren't torch's, to be looked at again."""

    def __init__(self, kept: Iterable[Any]) -> None:
        self._generators = [*_shared(), *(each for each in kept if not isinstance(each, Generator))]
        self._seen = [_state(generator) for generator in self._generators]
        self._whole = [_state(generator, whole=True) for generator in self._generators]

    def moved(self) -> list[Any]:
        """The generators whose states are others now."""
        pairs = zip(self._generators, self._seen, strict=True)
        return [generator for generator, seen in pairs if _state(generator) != seen]

    def rewind(self) -> None:
        """Give all of them their states back."""
        for generator, seen, whole in zip(self._generators, self._seen, self._whole, strict=True):
            if _state(generator) != seen:
                _set_state(generator, pickle.loads(whole))


@contextmanager
def moves_watched(states: States, is_users: Callable[[str], bool]) -> Iterator[list[tuple[FrameType, int]]]:
    """What runs in this thread, watched line by line: the user's frame and line at which a state first moves."""
    found: list[tuple[FrameType, int]] = []

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if found or not is_users(frame.f_code.co_filename):
            return None
        last = frame.f_lineno

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if not found and states.moved():
                found.append((frame, last))
            last = frame.f_lineno
            return step

        return step

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield found
    finally:
        sys.settrace(before)


def _shared() -> list[Any]:
    """The generators that belong to no model: torch's, Python's and numpy's own."""
    found: list[Any] = [*_defaults(), random.random.__self__]  # type: ignore[attr-defined]
    if "numpy" in sys.modules:
        found.append(sys.modules["numpy"].random.mtrand._rand)
    return found


def kept_generators(module: nn.Module, given: Sequence[Any] = ()) -> list[Any]:
    """The generators, of torch, Python and numpy, that a model's attributes, and their attributes, hold."""
    found: list[Any] = []
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(each, 0) for sub in module.modules() for each in _within(sub)]
    pending += [(value, 0) for value in given]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if is_generator(value):
            found.append(value)
        elif not isinstance(value, (Tensor, nn.Module, type)):
            pending += [(each, depth + 1) for each in _within(value)]
    return found


_DEEPEST = 4
"""Containers and objects inside one another that are looked into."""


def _within(value: Any) -> Iterable[Any]:
    """What a container, a function or an object holds; of what a function reads from its file, generators alone."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        names = [value.__globals__.get(name) for name in value.__code__.co_names]
        return [*cells, *filter(is_generator, names)]
    inside = [*vars(value).values()] if hasattr(value, "__dict__") else []
    return [*inside, type(value).forward] if isinstance(value, nn.Module) else inside


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def is_generator(value: Any) -> bool:
    """Whether this draws random numbers: a generator of torch, Python or numpy."""
    kinds: tuple[Any, ...] = (Generator, random.Random)
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        kinds = (*kinds, numpy.Generator, numpy.RandomState)
    return isinstance(value, kinds)


def _is_own(generator: Any) -> bool:
    return isinstance(generator, Generator) and all(generator is not default for default in _defaults())


def _defaults() -> list[Generator]:
    """Torch's own generators: the CPU's, and those of devices that are in use."""
    found = [torch.default_generator]
    if torch.cuda.is_initialized():
        found += torch.cuda.default_generators
    return found


def _state(generator: Any, whole: bool = False) -> bytes:
    if not whole and any(generator is default for default in _defaults()):
        return pickle.dumps(generator.initial_seed())  # other threads may draw from it, too
    if isinstance(generator, Generator):
        with out_of_sight():
            return pickle.dumps(generator.get_state().numpy())
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return pickle.dumps(generator.bit_generator.state)
    return pickle.dumps(generator.get_state())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, Generator):
        generator.set_state(torch.from_numpy(state))
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
