"""Caches of diffusers: hooks that leave out work by what earlier calls computed, which no graph of one call knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxstream.errors import CaptureError
from fxstream.passes.graph.capture import owner


def refuse_caches(target: Callable[..., Any]) -> None:
    """Raise ``CaptureError`` where a cache of diffusers is on in a model, by ``enable_cache`` or by itself."""
    model, _ = owner(target)
    for path, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in getattr(registry, "hooks", {}).values():
            if getattr(hook, "_is_stateful", False):
                name = type(model).__name__
                raise CaptureError(
                    f"could not capture {name} as one graph: a cache of diffusers is on in {path or name} "
                    f"({type(hook).__name__}), which leaves out work by what earlier calls computed\n  "
                    "Call disable_cache() on the model. Step Rehash does the like for a streamed model: "
                    "fxstream.optimize(..., step_rehash=fxstream.StepRehash())",
                    module_path=path,
                )
