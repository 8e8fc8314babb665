"""The model that does not fit: a transformer of 14 billion parameters from its file, in memory far below its weights.

Random weights of the published configuration are written as safetensors shards. One child loads them as diffusers does,
which leaves them mapped, and runs one step of a small video with its weights on disk; it ends itself if its anonymous
memory passes a limit. Another runs the model as it is, from the same mapped files, which the system keeps what it can
of. Each prints its time, the most memory that it had resident, and what it read; the results are compared. It takes
many minutes, and 30 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate

import fxstream
from fxstream.tools import catalogue
from fxstream.tools.bench import processor, relative_l2
from fxstream.tools.measure import WatchedMemory

GIB = 2**30
WAYS = ("streamed", "eager")
SHARD = 2 * GIB

_WAN = catalogue.CATALOGUE["wan-transformer"]
WAN_14B = replace(
    _WAN,
    name="wan-14b-transformer",
    source="Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json",
    config={**_WAN.config, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
)
QUICK = replace(WAN_14B, config={**WAN_14B.config, "num_attention_heads": 4, "ffn_dim": 1024, "num_layers": 2})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_offload", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", default="4GiB", help="of the streamed call (default: 4GiB)")
    parser.add_argument("--limit", type=float, default=5.0, help="GiB of anonymous memory (default: 5)")
    parser.add_argument("--folder", type=Path, help="where the weights are written (default: a temporary folder)")
    parser.add_argument("--quick", action="store_true", help="a model of few and narrow layers")
    parser.add_argument("--way", choices=WAYS, help="run one way, in this process")
    options = parser.parse_args()
    if options.way:
        _run(options)
        return
    with tempfile.TemporaryDirectory(prefix="fxstream-bench-", dir=options.folder) as folder:
        _write(QUICK if options.quick else WAN_14B, Path(folder))
        rows = [_row(way, folder, options) for way in WAYS]
        streamed, eager = (Path(folder) / f"{way}.pt" for way in WAYS)
        off = relative_l2(torch.load(streamed), torch.load(eager)) if streamed.exists() and eager.exists() else None
    print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}; {WAN_14B.name}, bfloat16, 5 x 64x64\n")
    headers = ["", "weights GiB", "planned GiB", "anonymous GiB", "resident GiB", "read GiB", "seconds", "planning s"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"\nRelative L2 between them: {'-' if off is None else format(off, '.1e')}")


def _row(way: str, folder: str, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "fxstream.tools.bench_offload", "--way", way, "--folder", folder]
    command += ["--budget", options.budget, "--limit", str(options.limit), *(["--quick"] if options.quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
    print(f"{way}: {last}", file=sys.stderr, flush=True)
    return [way, *(last.split("\t") if done.returncode == 0 else [last[:80]])]


def _write(entry: catalogue.Entry, folder: Path) -> None:
    """Random weights in shards, with the index and the configuration that diffusers loads."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = pkgutil.resolve_name(entry.class_path)(**entry.config)
    model.save_config(folder)
    noise = torch.randn((1 << 26) + 4099, dtype=torch.bfloat16)
    shard: dict[str, torch.Tensor] = {}
    places: dict[str, str] = {}
    number = 0
    for name, like in model.state_dict().items():
        first = torch.randint(4099, ()).item()
        flat = noise[first:][: min(like.numel(), 1 << 26)].repeat(-(-like.numel() // (1 << 26)))[: like.numel()]
        shard[name] = flat.reshape(like.shape) / max(1, like[0].numel() if like.ndim > 1 else 1) ** 0.5
        if like.ndim == 1 and name.endswith("weight"):
            shard[name] = torch.ones(like.shape, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD or len(places) + len(shard) == len(
            model.state_dict()
        ):
            number += 1
            file = f"diffusion_pytorch_model-{number:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard.clear()
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _run(options: argparse.Namespace) -> None:
    memory = WatchedMemory(options.limit)
    memory.start()
    torch.set_grad_enabled(False)
    entry = QUICK if options.quick else WAN_14B
    model: Any = pkgutil.resolve_name(entry.class_path).from_pretrained(options.folder, torch_dtype=torch.bfloat16)
    model.requires_grad_(False)
    torch.manual_seed(1)
    shape = entry.shape.resized(frames=5, height=64, width=64, batch=1)
    args, kwargs = entry.inputs(model.config, shape, torch.bfloat16)
    planned = moved = seconds_planning = "-"
    if options.way == "streamed":
        model = fxstream.optimize(model, options.budget, args, kwargs, offload="disk")
        (plan,) = model.plans
        planned = f"{(plan.peak_bytes + plan.after.weight_bytes + plan.input_bytes) / GIB:.2f}"
        moved = f"{plan.moved_bytes / GIB:.2f}"
        seconds_planning = f"{sum(plan.seconds.values()):.0f}"
    weights = sum(parameter.nbytes for parameter in model.parameters()) / GIB
    began = time.perf_counter()
    [result] = model(*args, **kwargs)
    seconds = time.perf_counter() - began
    torch.save(result.clone(), options.folder / f"{options.way}.pt")
    held = f"{memory.anonymous:.2f}\t{memory.resident:.2f}"
    print(f"{weights:.2f}\t{planned}\t{held}\t{moved}\t{seconds:.0f}\t{seconds_planning}")


if __name__ == "__main__":
    main()
