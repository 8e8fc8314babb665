"""Internal errors: what goes wrong in a pass is told as a fault of fxstream, with the graph that it was given saved."""

from __future__ import annotations

import platform
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxstream.errors import FxstreamError, InternalError


@contextmanager
def internal_errors(doing: str, graph_module: fx.GraphModule) -> Iterator[None]:
    """Raise ``InternalError`` for any error but fxstream's own; ``doing`` says what, as in "planning"."""
    try:
        yield
    except FxstreamError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"fxstream failed in {doing}: {type(error).__name__}: {first}\n  This is a fault of fxstream, not of "
        path = _saved(graph_module, error)
        saved = f"with the graph, which is in {path} (no weights, no inputs)" if path else "with the model"
        message += f"the model, which is as it was. Please report it as an issue of fxstream, {saved}."
        raise InternalError(message, path=path) from error


def _saved(graph_module: fx.GraphModule, error: Exception) -> str:
    """Write the versions, the error and the graph to a new file; its path, "" where nothing can be written."""
    lines = [f"{name} {version(name)}" for name in ("fxstream", "torch")]
    lines += [f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}", ""]
    lines += ["".join(traceback.format_exception(error)), *_listed(graph_module.graph)]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fxstream-", suffix=".txt", delete=False) as file:
            file.write("\n".join(lines) + "\n")
    except OSError:
        return ""
    return file.name


def _listed(graph: fx.Graph) -> Iterator[str]:
    """The nodes with the layouts of their values."""
    for node in graph.nodes:
        yield node.format_node() or f"return {node.args[0]}"
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor):
                yield f"    {str(value.dtype).removeprefix('torch.')}{[*value.shape]} strides {[*value.stride()]}"
