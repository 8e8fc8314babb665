"""Compiling a rewritten graph through the backends of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._dynamo import list_backends, lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._guards import TracingContext, tracing
from torch.utils._python_dispatch import _disable_current_modes

from fxstream.passes.graph.propagate import fake_mode_of
from fxstream.passes.rewriting.lower import Lowering

BACKEND = "fxstream"
"""The name under which torch.compile finds fxstream."""


def compile_by(compiler: str, graph_module: fx.GraphModule) -> fx.GraphModule:
    """A rewritten graph with its pieces and its loops' bodies compiled by the backend of that name."""
    return Lowering(compiler, partial(_compile, compiler)).lower(graph_module)


def _compile(compiler: str, graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Compile a graph whose placeholders carry fake values, for inference, by the backend of that name."""
    examples = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    context = TracingContext(fake_mode_of(graph_module.graph))
    with torch.no_grad(), tracing(context), _disable_current_modes():
        return lookup_backend(compiler)(graph_module, examples)


def check_compiler(compiler: object, what: str) -> str:
    """The name of a backend of torch.compile, given as ``what``; raises ``ValueError`` where there is none such."""
    known = sorted(set(list_backends(exclude_tags=())) - {BACKEND})
    try:
        if not isinstance(compiler, str) or compiler == BACKEND:
            raise InvalidBackend(name=str(compiler))
        lookup_backend(compiler)
    except InvalidBackend:
        raise ValueError(f"{what} {compiler!r} is no backend of torch.compile: use one of {', '.join(known)}") from None
    return compiler
