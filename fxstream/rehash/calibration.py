"""Calibration: how alike the steps of full generations are at a cut, and the key steps that follow from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fxstream.passes.graph.capture import owner
from fxstream.rehash.key_steps import key_steps, most_alike

FORMAT = 1
"""Version of the JSON file."""

TIME_TOLERANCE = 1e-3
"""Timesteps are the same where they differ by no more than this share of the first."""


@dataclass(frozen=True)
class Calibration:
    """How alike the steps of a model's generations are, at one or more cuts.

    ``similarity[cut][i][j]`` is the cosine similarity of the cut's values in steps ``i`` and ``j``, averaged over
    generations and over the calls of a step. ``timesteps`` are the generation's K times, ``model`` a fingerprint of the
    model's class and of the names and shapes of its weights.
    """

    model: str
    timesteps: tuple[float, ...]
    similarity: Mapping[str, tuple[tuple[float, ...], ...]]

    @property
    def steps(self) -> int:
        """K, the number of steps of a generation."""
        return len(self.timesteps)

    def key_steps(
        self, full_steps: int | None = None, *, gamma: float | None = None, cut: str | None = None
    ) -> tuple[int, ...]:
        """The full steps by Algorithm 1, for a ``gamma`` or for at most ``full_steps`` of them.

        ``cut`` is needed where there are several. Raises ``ValueError`` for a cut that was not calibrated, or a number
        out of range.
        """
        if (full_steps is None) == (gamma is None):
            raise ValueError("give one of full_steps and gamma")
        if cut is None and len(self.similarity) == 1:
            (cut,) = self.similarity
        if cut is None or cut not in self.similarity:
            raise ValueError(f"the cut {cut!r} was not calibrated: there are {', '.join(self.similarity)}")
        found = self.similarity[cut]
        if full_steps is not None:
            return most_alike(found, full_steps)
        assert gamma is not None
        if not -1 <= gamma <= 1:
            raise ValueError(f"gamma={gamma!r} is out of range: it is a cosine similarity")
        return key_steps(found, gamma)

    def check_model(self, model: Callable[..., Any]) -> None:
        """Raise ``ValueError`` if the calibration is of another model."""
        module, _ = owner(model)
        found = fingerprint(module)
        if found != self.model:
            raise ValueError(f"the calibration is of another model: of {self.model}, not {found}")

    def check_time(self, step: int, time: float) -> None:
        """Raise ``ValueError`` if a generation's step is at another time than the calibration's."""
        expected = self.timesteps[step]
        if abs(time - expected) > TIME_TOLERANCE * max(abs(x) for x in self.timesteps):
            raise ValueError(
                f"the calibration is for other steps: its step {step} of {self.steps} is at timestep {expected:g}, "
                f"this generation's at {time:g}. Calibrate with the scheduler and the number of steps that you use"
            )

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what ``save`` wrote. Raises ``ValueError`` for anything else."""
        try:
            found = json.loads(Path(path).read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']} is not known")
            maps = {cut: tuple(tuple(map(float, row)) for row in rows) for cut, rows in found["similarity"].items()}
            made = Calibration(str(found["model"]), tuple(map(float, found["timesteps"])), maps)
            if any(len(row) != made.steps for rows in maps.values() for row in (rows, *rows)):
                raise ValueError("its maps and its timesteps are of different sizes")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no calibration: {error}") from None
        return made

    def plot(self, path: str | Path) -> None:
        """Draw the maps, side by side, into an image file. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2 * len(self.similarity), 3.8), layout="constrained")
        for number, (cut, rows) in enumerate(self.similarity.items()):
            axes = figure.add_subplot(1, len(self.similarity), number + 1)
            image = axes.imshow(rows, origin="lower")
            axes.set(title=cut, xlabel="step", ylabel="step")
            figure.colorbar(image, ax=axes, label="cosine similarity")
        figure.savefig(path)


def fingerprint(module: nn.Module) -> str:
    """A model's class, and a digest of the names and shapes of its weights."""
    weights = [(name, tuple(weight.shape)) for name, weight in module.named_parameters()]
    return f"{type(module).__name__}-{hashlib.sha256(repr(weights).encode()).hexdigest()[:16]}"
