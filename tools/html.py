"""An inspection as one web page that needs nothing else: no network, no other file."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from fxstream.tools.document import Document

TEMPLATE = "page.html"


def to_html(found: Document) -> str:
    """The page of a document."""
    paths: dict[str, int] = {}
    dtypes: dict[str, int] = {}
    about = [found["model"], *found["inputs"], f"budget {found['budget']}", f"device {found['device']}"]
    data = {
        "title": found["target"],
        "about": ", ".join(about),
        "fits": found["fits"],
        **{key: found[key] for key in ("weight_bytes", "input_bytes", "groups", "barriers", "measured", "added_flops")},
        **{which: _columns(found[which], paths, dtypes) for which in ("before", "after")},
    }
    data |= {"paths": list(paths), "dtypes": list(dtypes)}
    # Nothing within a script may look like the end of it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return files("fxstream.tools").joinpath(TEMPLATE).read_text(encoding="utf-8").replace("DOCUMENT", text, 1)


def _columns(profile: dict[str, Any], paths: dict[str, int], dtypes: dict[str, int]) -> dict[str, Any]:
    """A schedule as columns; module paths and dtypes as numbers in the order of their first use."""
    tensors = profile["tensors"]
    return {
        "peak_bytes": profile["peak_bytes"],
        "peak_index": profile["peak_index"],
        "nodes": [node["name"] for node in profile["nodes"]],
        "modules": [paths.setdefault(node["module"], len(paths)) for node in profile["nodes"]],
        "live": [node["live_bytes"] for node in profile["nodes"]],
        "tensors": {
            "node": [tensor["node"] for tensor in tensors],
            "module": [paths.setdefault(tensor["module"], len(paths)) for tensor in tensors],
            "shape": ["x".join(map(str, tensor["shape"])) for tensor in tensors],
            "dtype": [dtypes.setdefault(tensor["dtype"], len(dtypes)) for tensor in tensors],
            "size": [tensor["bytes"] for tensor in tensors],
            "birth": [tensor["birth"] for tensor in tensors],
            "death": [tensor["death"] for tensor in tensors],
        },
    }
