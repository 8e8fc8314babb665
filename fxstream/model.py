"""One model, or a bound method of one: optimized in whichever way was asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxstream.budget import Budget, Resident
from fxstream.compile.regions import Region
from fxstream.disk import Store
from fxstream.module import StreamedModule
from fxstream.passes.graph.call import Inputs
from fxstream.passes.graph.places import Place
from fxstream.passes.graph.snapshot import environment
from fxstream.planned import Compiled, compile_call
from fxstream.rehash.rehash import rehash_module
from fxstream.rehash.settings import StepRehash
from fxstream.submodules import Residents, Submodules


def optimize_model(
    model: Callable[..., Any],
    budget: Budget,
    allow_recompute: bool = False,
    step_rehash: StepRehash | None = None,
    backend: str | None = None,
    resident: Callable[[Sequence[torch.Tensor]], Resident] | None = None,
    store: Store | None = None,
    fullgraph: bool = False,
) -> StreamedModule:
    """A streamed module in place of ``model``, or with ``step_rehash`` one that skips steps.

    ``resident``, given a call's input tensors, says what the device holds beside them and the activations; by itself a
    module is taken to be alone there with the weights that the call uses. With a ``store`` weights may live on disk,
    and ``resident`` tells what is held beside the module's own. A call that depends on data is refused with
    ``fullgraph``, and else has its submodules streamed.
    """

    known: list[tuple[Any, Compiled]] = []

    def compiler(args: Sequence[Any], kwargs: Mapping[str, Any], live: Collection[Place]) -> Compiled:
        if store is not None:
            store.refuse_elsewhere()
        held = None if resident is None else resident(Inputs.of(args, kwargs).tensors)
        disk = store.disk if store is not None else None
        around = environment()
        alike = [each for then, each in known if then == around]
        compiled = compile_call(model, args, kwargs, budget, allow_recompute, held, backend, live, disk, alike)
        if any(compiled.run is each.run for each in alike):
            return compiled
        if store is not None:
            fetched = {weight.name for weight in compiled.plan.fetched}
            compiled = replace(compiled, run=store.running(compiled.graph_module, fetched, compiled.run))
        known.append((around, compiled))
        return compiled

    def fits(compiled: Any, tensors: Sequence[torch.Tensor]) -> bool:
        if resident is None or compiled.resident is None or budget.total_bytes is None:
            return True
        held, made = resident(tensors).bytes, compiled.plan
        mine = made.input_bytes + made.peak_bytes + (0 if store is None else made.after.weight_bytes)
        return held <= max(compiled.resident.bytes, budget.total_bytes - mine)

    if step_rehash is not None:
        return rehash_module(model, budget, step_rehash, allow_recompute, backend, resident, fits)

    def stream(module: nn.Module, beside: Residents | None) -> StreamedModule:
        return optimize_model(module, budget, allow_recompute, None, backend, beside or resident, store)

    region = Region(budget, backend, allow_recompute) if store is None else None
    submodules = None if fullgraph else Submodules(model, budget, resident, stream)
    return StreamedModule(model, compiler, region, fits, submodules)
