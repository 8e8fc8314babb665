"""Calibrating: generations run in full, and how alike their steps are at the cuts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fxstream.caches import refuse_caches
from fxstream.module import StreamedModule
from fxstream.passes.graph.capture import capture, owner
from fxstream.passes.graph.internal import internal_errors
from fxstream.passes.graph.normalize import normalize
from fxstream.passes.graph.places import Place
from fxstream.passes.rewriting.split import returning
from fxstream.rehash.calibration import Calibration, fingerprint
from fxstream.rehash.rehash import Generation
from fxstream.rehash.settings import StepRehash
from fxstream.rehash.steps import cut_values, places

DENOISERS = ("unet", "transformer")
"""Components of a pipeline that denoise."""


def calibrate(
    run: Any,
    model: Callable[..., Any] | None = None,
    *,
    cuts: Sequence[str | Sequence[str]] = ("auto",),
    generations: int = 1,
    arguments: Mapping[str, Any] | None = None,
    rehash: StepRehash | None = None,
) -> Calibration:
    """Run full generations and measure how alike their steps are at some cuts.

    ``run`` is a diffusers pipeline, called with ``arguments``, or a function that makes a generation with the module
    that it is given, in place of ``model``: ``calibrate(lambda unet: sample(unet, steps=25), unet)``. It is called
    ``generations`` times. ``cuts`` are as in ``StepRehash(cut=...)``, "deepcache:1" being that of branch 1; ``rehash``
    has other settings of the cuts (``keep``, ``timestep``). Values are kept in host memory meanwhile.

    Raises ``ValueError`` where there is nothing to run, or generations differ in their steps.
    """
    if isinstance(run, nn.Module) or not callable(run):
        raise ValueError(f"a {type(run).__name__} makes no generation: give a pipeline, or a function of the model")
    if isinstance(cuts, str) or not cuts or generations < 1:
        raise ValueError("calibrate needs a list of at least one cut, and at least one generation")
    settings = [_settings(rehash or StepRehash(), cut) for cut in cuts]
    if isinstance(getattr(run, "components", None), dict):
        name, model, call = _denoiser(run, model, arguments or {})
    elif model is None:
        raise ValueError("calibrate needs the model as well: calibrate(function, model)")
    else:
        name, call = None, run
    recorder = Recorder(model, settings)
    maps, times = [], None
    for _ in range(generations):
        recorder.begin()
        if name is not None:
            setattr(run, name, recorder)
        try:
            call(recorder)
        finally:
            if name is not None:
                setattr(run, name, model)
        if len(recorder.times) < 2:
            raise ValueError(
                f"the generation called the model at {len(recorder.times)} timesteps: there is nothing to compare"
            )
        if times not in (None, recorder.times):
            raise ValueError(f"the generations differ in their steps: {times} and {recorder.times}")
        times = recorder.times
        maps.append(recorder.similarity())
    assert times is not None
    module, _ = owner(model)
    averaged = {each.cut_name: torch.stack([found[n] for found in maps]).mean(dim=0) for n, each in enumerate(settings)}
    return Calibration(
        fingerprint(module),
        tuple(times),
        {cut: tuple(tuple(row) for row in found.tolist()) for cut, found in averaged.items()},
    )


def _settings(rehash: StepRehash, cut: str | Sequence[str]) -> StepRehash:
    made = StepRehash(cut=cut, keep=rehash.keep, timestep=rehash.timestep)
    name, _, branch = made.cut_name.partition(":")
    return replace(made, cut=name, branch=int(branch)) if name == "deepcache" and branch.isdecimal() else made


def _denoiser(
    pipe: Any, model: Callable[..., Any] | None, arguments: Mapping[str, Any]
) -> tuple[str, Any, Callable[[Any], Any]]:
    """The name of a pipeline's denoiser, the denoiser, and how to run a generation."""
    found = [name for name in pipe.components if (getattr(pipe, name) is model if model else name in DENOISERS)]
    found = [name for name in found if isinstance(getattr(pipe, name), nn.Module)]
    if len(found) != 1:
        raise ValueError(f"{type(pipe).__name__} has no single denoiser: give the model, one of its components")
    return found[0], getattr(pipe, found[0]), lambda _: pipe(**arguments)


class Recorder(StreamedModule):
    """Stands where the model stood, computes what it did, and keeps the cuts' values of every step."""

    def __init__(self, model: Callable[..., Any], settings: Sequence[StepRehash]) -> None:
        def compiler(args: Sequence[Any], kwargs: Mapping[str, Any], live: Collection[Place]) -> Any:
            refuse_caches(model)
            captured = capture(model, args, kwargs, live)
            captured.state.refuse_tensors("a calibration")
            with internal_errors("normalizing", captured.graph_module):
                normalize(captured.graph_module)
            return _Recorded(model, captured, args, kwargs, settings)

        super().__init__(model, compiler)
        self.begin()

    def begin(self) -> None:
        """Forget what was recorded."""
        self.__dict__["_place"] = Generation()
        self.__dict__["_values"] = {}
        self.__dict__["times"] = []

    def _run(self, compiled: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        place, now = self._place, float(tensors[compiled.timestep].max())
        place.enter(now, compiled, tensors)
        if place.call == 0:
            if place.step != len(self.times):
                raise ValueError(f"a second generation began at timestep {now:g}: calibrate with one at a time")
            self.times.append(now)
        found = compiled.graph_module(*tensors)
        values = iter(found[compiled.results :])
        for number, count in enumerate(compiled.counts):
            held = [next(values).flatten().to("cpu", torch.float32) for _ in range(count)]
            self._values.setdefault((number, place.call), {})[place.step] = torch.cat(held)
        return found[: compiled.results]

    def similarity(self) -> list[Tensor]:
        """For each cut a K x K map, averaged over the calls of a step."""
        maps: dict[int, list[Tensor]] = {}
        for (cut, _), by_step in self._values.items():
            if len(by_step) == len(self.times):  # a call that not every step makes says nothing of all
                unit = nn.functional.normalize(torch.stack([by_step[step] for step in range(len(self.times))]), dim=1)
                maps.setdefault(cut, []).append((unit @ unit.T).clamp(-1, 1).double())
        return [torch.stack(maps[cut]).mean(dim=0) for cut in sorted(maps)]


class _Recorded:
    """A captured call whose graph also returns the values of all cuts, ``counts`` of each."""

    def __init__(self, model: Callable[..., Any], captured: Any, args: Any, kwargs: Any, settings: Any) -> None:
        self.captured = captured
        self.latent, self.timestep = places(model, args, kwargs, settings[0].timestep)
        graph_module = captured.graph_module
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        here = placeholders[self.latent], placeholders[self.timestep]
        self.results = len(graph_module.graph.output_node().args[0])
        cuts = [cut_values(graph_module, *here, each) for each in settings]
        self.counts = [len(cut) for cut in cuts]
        self.graph_module = returning(graph_module, [node for cut in cuts for node in cut])
