"""Train the demo's model: a small video UNet of diffusers that learns the clips of `shapes`.

    python -m fxstream.tools.train_demo_model

Draws its data as it goes, trains on the CPU (about 75 minutes on two cores), says how it is getting on, and writes
averaged weights and their configuration into a folder. A second part goes on from the averaged weights of the first,
at a high rate again. A run that was stopped goes on from its checkpoint. On one kind of machine the result follows from
the seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNetMotionModel
from torch.nn import functional

from fxstream.tools import shapes
from fxstream.tools.generation import CONFIGURATION, FOLDER, label_embedding, noise_schedule, pack

DROPPED = 0.15
"""Share of labels that are dropped, for classifier-free guidance."""

NOISY = 0.6
"""Timesteps are drawn evenly as shares of all and raised to this power: below 1, noisy ones are drawn more often."""

WARM_UP = 100
LOWEST_RATE = 0.02
LOGGED, SAVED = 50, 200


@dataclass(frozen=True)
class Part:
    """A part of the training: a learning rate that rises to ``rate``, then falls along a cosine.

    The average of the weights forgets all but a share ``memory`` of itself at each step.
    """

    steps: int
    rate: float
    memory: float


PARTS = (Part(5400, rate=2e-3, memory=0.998), Part(1300, rate=1.5e-3, memory=0.997))
STEPS = sum(part.steps for part in PARTS)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fxstream.tools.train_demo_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"stop there (default: {STEPS}, all)")
    parser.add_argument("--batch", type=int, default=8, help="clips a step (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the weights and their configuration")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo_model.pt"), help="where to go on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = Training(options.seed)
    if options.checkpoint.exists():
        training.load(options.checkpoint)
    training.run(options)


class Training:
    """The model, a moving average of its weights, and all else that a run goes on from."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.model = UNetMotionModel(**CONFIGURATION).train()
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = self._new_optimizer()
        self.scheduler = noise_schedule()
        self.step, self.seconds = 0, 0.0

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)

    def part(self) -> tuple[Part, int]:
        """The part that the next step is of, and how many steps of it were taken."""
        step, (first, *others) = self.step, PARTS
        for part in others:
            if step < first.steps:
                break
            step, first = step - first.steps, part
        return first, step

    def run(self, options: argparse.Namespace) -> None:
        """Train from where it stands to the last step."""
        millions = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        print(f"{millions:.2f} M parameters, from step {self.step} on", flush=True)
        began, losses = time.perf_counter() - self.seconds, []
        while self.step < options.steps:
            losses.append(self.update(options.batch))
            self.seconds = time.perf_counter() - began
            if self.step % LOGGED == 0:
                loss = sum(losses) / len(losses)
                print(f"step {self.step:5d}  {self.seconds / 60:5.1f} min  loss {loss:.4f}", flush=True)
                losses = []
            if self.step % SAVED == 0:
                self.save(options.checkpoint)
        self.save(options.checkpoint)
        self.write(options.out)

    def update(self, batch: int) -> float:
        """One step on fresh clips; returns its loss, the mean square error of the velocity."""
        part, step = self.part()
        if step == 0:
            self.model.load_state_dict(self.averaged.state_dict())
            self.optimizer = self._new_optimizer()
        decay = LOWEST_RATE + (1 - LOWEST_RATE) * math.cos(step / part.steps * math.pi / 2) ** 2
        for group in self.optimizer.param_groups:
            group["lr"] = part.rate * min((step + 1) / WARM_UP, 1) * decay
        clips = shapes.draw(batch, self.generator)
        clean = pack(clips.video)
        # Timesteps spread evenly over the batch: the loss varies less.
        spread = (torch.arange(batch) + torch.rand(batch, generator=self.generator)) / batch
        timestep = (spread**NOISY * self.scheduler.config.num_train_timesteps).long()
        noise = torch.randn(clean.shape, generator=self.generator)
        kept = torch.rand(batch, generator=self.generator) >= DROPPED
        label = label_embedding(clips.shape, clips.motion, clips.colour, kept)
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        predicted = self.model(noisy, timestep, label, return_dict=False)[0]
        loss = functional.mse_loss(predicted, self.scheduler.get_velocity(clean, noise, timestep))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        memory = min(part.memory, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(weight, 1 - memory)
        return loss.item()

    def write(self, folder: Path) -> None:
        """The averaged weights, in half precision, and their configuration."""
        copy.deepcopy(self.averaged).half().save_pretrained(folder)

    def save(self, checkpoint: Path) -> None:
        """All that a run goes on from, in one file."""
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(checkpoint)

    def load(self, checkpoint: Path) -> None:
        """Go on from a file that ``save`` wrote."""
        saved = torch.load(checkpoint, weights_only=True)
        for name in ("model", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds = saved["step"], saved["seconds"]


if __name__ == "__main__":
    main()
