"""Offloading as diffusers and accelerate do it: which components share the device, and hooks while models change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxstream.passes.graph.capture import owner
from fxstream.pipeline.components import modules_of


def offloaded(pipeline: Any) -> dict[str, str | None]:
    """The components that come to the device for their calls alone -> the one that leaves it for them.

    As ``enable_model_cpu_offload`` chains them. Raises ``ValueError`` where weights come and go within a component.
    """
    hooks = {}
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        _refuse_parts(name, part)
        hook = vars(part).get("_hf_hook")
        if hasattr(hook, "prev_module_hook"):
            hooks[name] = hook
    modules = {id(module): name for name, module in modules_of(pipeline).items()}
    previous = {name: hook.prev_module_hook for name, hook in hooks.items()}
    return {name: modules.get(id(owner(hook.model)[0])) if hook else None for name, hook in previous.items()}


def _refuse_parts(name: str, component: nn.Module) -> None:
    for sub in component.modules():
        hook, registry = getattr(sub, "_hf_hook", None), getattr(sub, "_diffusers_hook", None)
        by_layers = any(getattr(one, "offload", False) is True for one in getattr(hook, "hooks", [hook]))
        by_groups = any("offload" in kind for kind in getattr(registry, "hooks", {}))
        if by_layers or by_groups:
            raise ValueError(
                f"the weights of {name} come to the device a part at a time, where a plan finds them all or none: use "
                'enable_model_cpu_offload(), or on the CPU offload="disk", instead of sequential or group offloading'
            )


class Device:
    """Which components' weights are on the device, as one call follows another."""

    def __init__(self, names: list[str], previous: dict[str, str | None]) -> None:
        self._previous = previous
        self.there = [name for name in names if name not in previous]

    def enters(self, name: str) -> None:
        """A component is called."""
        leaving = self._previous.get(name)
        if leaving in self.there:
            self.there.remove(leaving)
        if name not in self.there:
            self.there.append(name)


@contextmanager
def hooks_removed(pipeline: Any, for_good: bool = False) -> Iterator[None]:
    """Without the hooks of ``enable_model_cpu_offload``; afterwards they are on the components that are there then.

    ``for_good``: afterwards only where something was raised.
    """
    if not getattr(pipeline, "_all_hooks", None):
        yield
        return
    pipeline.remove_all_hooks()
    try:
        yield
    except BaseException:
        hook_again(pipeline)
        raise
    if not for_good:
        hook_again(pipeline)


def hook_again(pipeline: Any) -> None:
    """Give a pipeline the hooks back that it had."""
    pipeline.enable_model_cpu_offload(device=pipeline._offload_device)
