"""Prints what each stage of a published pipeline holds, planned to the lowest reachable: all weights on the device, and
with `enable_model_cpu_offload()`; each without and with values computed again.

Run with `make table-pipeline`, or with names of `fxstream.tools.pipelines` as arguments. Nothing is computed, and no
weights are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

from fxstream.api import plan
from fxstream.budget import format_bytes
from fxstream.tools.pipelines import PIPELINES, build


def main(names: Sequence[str]) -> None:
    for name, offload, again in product(names, (False, True), (False, True)):
        where = "with enable_model_cpu_offload()" if offload else "all weights on the device"
        where += ", allow_recompute" if again else ""
        print(f"planning {name}, {where} ...", file=sys.stderr, flush=True)
        pipeline, call = build(name)
        if offload:
            pipeline.enable_model_cpu_offload(device="cpu")
        found = plan(pipeline, allow_recompute=again, **call)
        sizes = ", ".join(f"{key} {value}" for key, value in PIPELINES[name].call.items())
        print(f"{name}, {sizes}, float16, {where}: {format_bytes(found.peak_bytes)}\n\n{found}\n", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["svd"])
