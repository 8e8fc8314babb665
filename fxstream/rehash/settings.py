"""What Step Rehash is asked for: which steps are skipped, and what stands for the value that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxstream.rehash.calibration import Calibration

if TYPE_CHECKING:
    from fxstream.rehash.rehash import RehashedModule

PREDICTORS = ("reuse", "taylor")


@dataclass(frozen=True)
class StepRehash:
    """Which steps are skipped, where the model is cut, and what stands for the cut's value in a skipped step.

    The schedule is one of

    - ``every``: each ``every``-th step is computed in full (the default: 2);
    - ``key_steps``: the indices of the full steps, ascending, from 0 on;
    - ``calibration``, with ``full_steps`` or ``gamma``: the key steps that Algorithm 1 of the paper finds in it;
    - ``threshold``: a step is skipped while the relative L1 change of an early value since the last full step is below
      it, for at most ``max_skips`` steps in a row. The value is the first that depends on both the latent and the
      timestep; it is computed in every step, and compared in a sample of its elements.

    The first ``warm_up`` and the last ``cool_down`` steps are full in any case; for the latter the number of ``steps``
    has to be known. With ``steps`` (a calibration knows its own) a longer generation is refused.

    ``cut`` is "auto" (the fewest bytes at no more than ``keep`` of the model's FLOPs in a skipped step), "deepcache"
    (below the skip connection numbered ``branch`` from the output), "paper" (after the last block), the path of a
    module, the name of a node of the captured graph, or several of these two. ``predictor`` is "reuse" or "taylor", of
    ``order`` 1 or 2, over the values and times of the last full steps, damped by what would have served best at the
    last of them. ``timestep`` names the model's argument that is the timestep, where its signature doesn't.

    Raises ``ValueError`` for settings that can't be met.
    """

    every: int | None = None
    key_steps: Sequence[int] | None = None
    calibration: Calibration | None = None
    full_steps: int | None = None
    gamma: float | None = None
    threshold: float | None = None
    max_skips: int = 3
    steps: int | None = None
    warm_up: int = 1
    cool_down: int = 0
    cut: str | Sequence[str] = "auto"
    branch: int = 0
    keep: float = 0.2
    predictor: str = "reuse"
    order: int = 1
    timestep: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("every", "key_steps", "calibration", "threshold") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both schedules: give one")
        if not given:
            object.__setattr__(self, "every", 2)
        if self.calibration is not None:
            self._calibrated(self.calibration)
        elif self.full_steps is not None or self.gamma is not None:
            raise ValueError("full_steps and gamma choose key steps in a calibration: give calibration=... as well")
        for name, low in (("every", 1), ("steps", 1), ("max_skips", 1), ("warm_up", 1), ("cool_down", 0)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < low):
                raise ValueError(f"{name}={value!r} is out of range: it is a number of steps, at least {low}")
        if self.key_steps is not None:
            object.__setattr__(self, "key_steps", _checked(self.key_steps, self.steps))
        names = [self.cut] if isinstance(self.cut, str) else self.cut
        if not isinstance(names, Sequence) or not names or not all(name and isinstance(name, str) for name in names):
            raise ValueError(f"cut={self.cut!r} is no cut: give a preset, a module's path or a node, or a list")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold!r} is out of range: a relative change above 0")
        if self.cool_down and self.steps is None:
            raise ValueError("cool_down needs steps=..., the number of steps of a generation")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep={self.keep!r} is out of range: a share of the model's FLOPs in (0, 1)")
        if self.predictor not in PREDICTORS:
            raise ValueError(f"predictor={self.predictor!r} is none of {', '.join(PREDICTORS)}")
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order!r} is out of range: a Taylor predictor is of order 1 or 2")

    def _calibrated(self, calibration: Calibration) -> None:
        if not hasattr(calibration, "key_steps"):
            raise ValueError(f"calibration={calibration!r} is none: give what calibrate or Calibration.load returns")
        if (self.full_steps is None) == (self.gamma is None):
            raise ValueError("a calibration needs one of full_steps=... and gamma=...")
        if self.steps not in (None, calibration.steps):
            raise ValueError(f"the calibration is for {calibration.steps} steps, not {self.steps}")
        found = calibration.key_steps(self.full_steps, gamma=self.gamma, cut=self.cut_name)
        object.__setattr__(self, "key_steps", found)
        object.__setattr__(self, "steps", calibration.steps)

    @property
    def cut_name(self) -> str:
        """The cut as one string, as a calibration lists it."""
        name = self.cut if isinstance(self.cut, str) else ", ".join(self.cut)
        return f"{name}:{self.branch}" if self.cut == "deepcache" and self.branch else name

    @property
    def history(self) -> int:
        """Full steps whose values are held: one, and one more for each order of a Taylor predictor."""
        return 1 if self.predictor == "reuse" else self.order + 1

    def is_full(self, step: int, skips: int, change: float | None) -> bool:
        """Whether a step is computed in full, ``skips`` having been skipped before it.

        ``change`` is that of the early value since the last full step, where there is a threshold.
        """
        if step < self.warm_up or (self.steps is not None and step >= self.steps - self.cool_down):
            return True
        if self.key_steps is not None:
            return step in self.key_steps
        if self.threshold is not None:
            return change is None or change >= self.threshold or skips >= self.max_skips
        assert self.every is not None
        return step % self.every == 0

    def around(self, model: Callable[..., Any]) -> RehashedModule:
        """A module that stands where ``model`` stood and skips steps, without a memory budget."""
        from fxstream.rehash.rehash import rehash_module  # what it sets is below it

        return rehash_module(model, None, self)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(steps: Sequence[int], count: int | None) -> tuple[int, ...]:
    if not isinstance(steps, Sequence) or not all(map(_is_int, steps)):
        raise ValueError(f"key_steps={steps!r} is no list of steps: give their indices, from 0 on")
    found = tuple(steps)
    if not found or found[0] != 0:
        raise ValueError(f"key_steps={list(found)!r} does not begin with step 0, which has nothing to reuse")
    if list(found) != sorted(set(found)):
        raise ValueError(f"key_steps={list(found)!r} is not ascending: give each step once, in order")
    if count is not None and found[-1] >= count:
        raise ValueError(f"key step {found[-1]} is out of range: of {count} steps the last is {count - 1}")
    return found
