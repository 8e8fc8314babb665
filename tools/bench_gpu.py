"""What fxstream does on a CUDA card: what kernels allocate, exactness, peaks predicted and measured, time, a pipeline.

Each group of checks has a process of its own, one after the other, and appends a record as each check ends, so that
what was measured is kept whatever fails. In all at most eight minutes. With `--dry` tiny models go the same ways on a
CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import fxstream
from fxstream.fake import default_dtype
from fxstream.passes.machine.allocations import apart, trace_of, workspace_of
from fxstream.passes.machine.bounds import bound_bytes
from fxstream.passes.machine.card import CONTEXT
from fxstream.tools import catalogue
from fxstream.tools.bench import relative_l2
from fxstream.tools.environment import facts
from fxstream.tools.measure import measure_peak
from fxstream.tools.turns import finish

aten = torch.ops.aten

BUDGETS: tuple[Any, ...] = (0.5, "min")
SMALL = ("svd-vae", "svd-unet", "animatediff-unet", "wan-transformer", "ltx-vae")
LARGE = ("svd-vae", "svd-unet", "wan-transformer")
TINY: dict[str, Any] = {"frames": 2, "height": 8, "width": 8, "batch": 1}
LIMIT, PIPELINE = 480.0, "8GiB"


class Bench:
    """Checks of one process: where they run, when they have to end, and where their records go."""

    def __init__(self, dry: bool, ends: float, path: Path) -> None:
        self.dry, self.ends, self.path = dry, ends, path
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.budgets = (0.8, "min") if dry else BUDGETS  # of tiny models less can't be met

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """A check, which fills its record; one that raises leaves that. Raises ``TimeoutError`` with no time left."""
        record: dict[str, Any] = {"check": name, "ok": True}
        if time.time() > self.ends:
            self._add({**record, "ok": False, "error": "no time is left"})
            raise TimeoutError(name)
        try:
            yield record
        except Exception as error:
            record |= {"ok": False, "error": str(error).splitlines()[0][:300], "traceback": traceback.format_exc()}
        self._add(record)
        if not self.dry:
            torch.cuda.empty_cache()

    def _add(self, record: dict[str, Any]) -> None:
        told = {key: value for key, value in record.items() if key not in ("check", "ok", "traceback")}
        print("ok  " if record["ok"] else "FAIL", record["check"], told, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")

    def peaks(self, run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        """A run's result, and the bytes that it allocated at most and left the card with."""
        if self.dry:
            measured = measure_peak(run)
            return measured.result, {"allocated": measured.peak_bytes}
        torch.cuda.empty_cache()
        measured = measure_peak(run)
        retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        return measured.result, {
            "allocated": measured.peak_bytes,
            "reserved_in_all": torch.cuda.max_memory_reserved(),
            "retries": retries,
        }

    def median_seconds(self, run: Callable[[], Any], rounds: int = 3) -> float:
        """The median time of a run, after one that warms up."""
        times = []
        for _ in range(rounds + 1):
            finish()
            began = time.perf_counter()
            run()
            finish()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])


def environment(bench: Bench) -> None:
    with bench.check("environment") as record:
        record["about"] = facts()
        if not bench.dry:
            free = torch.cuda.mem_get_info()[0]
            torch.ones(1, device=bench.device) @ torch.ones(1, device=bench.device)
            finish()
            after, total = torch.cuda.mem_get_info()
            record |= {"free_before": free, "context": total - after - torch.cuda.memory_reserved(), "counted": CONTEXT}
            record["cudnn"] = torch.backends.cudnn.version()


def calls(small: bool) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Calls of operators whose kernels allocate something: a name, the operator, arguments on "meta"."""
    size = 8 if small else 96

    def x(*shape: int, dtype: torch.dtype = torch.float16, last: bool = False) -> torch.Tensor:
        form = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
        made = torch.empty(shape, dtype=dtype, device="meta")
        return made.contiguous(memory_format=form.get(len(shape), torch.contiguous_format))

    image, video = (4, 64, size, size), (1, 64, 8, size, size)
    pad2, pad3 = [1, 1], [1, 1, 1]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for last in (False, True):
            kind = f"{str(dtype).removeprefix('torch.')}{', channels last' if last else ''}"
            weight2, weight3 = x(64, 64, 3, 3, dtype=dtype, last=last), x(64, 64, 3, 3, 3, dtype=dtype, last=last)
            args = x(*image, dtype=dtype, last=last), weight2, None, pad2, pad2
            yield f"conv2d {kind}", aten.conv2d.default, args
            args = x(*video, dtype=dtype, last=last), weight3, None, pad3, pad3
            yield f"conv3d {kind}", aten.conv3d.default, args
            yield f"group_norm {kind}", aten.group_norm.default, (x(*video, dtype=dtype, last=last), 8)
        query = x(2, 8, 8 * size, 64, dtype=dtype)
        kind = str(dtype).removeprefix("torch.")
        yield f"attention {kind}", aten.scaled_dot_product_attention.default, (query, query, query)
        wide = x(1, 1, size * size, 512, dtype=dtype)
        yield f"attention of 512 {kind}", aten.scaled_dot_product_attention.default, (wide, wide, wide)
        mask = torch.empty(8 * size, 8 * size, dtype=torch.bool, device="meta")
        yield f"attention masked {kind}", aten.scaled_dot_product_attention.default, (query, query, query, mask)
        moments = torch.ops.fxstream.group_moments.default
        yield f"moments {kind}", moments, (x(*video, dtype=dtype), 8)
        yield f"mean {kind}", aten.mean.dim, (x(*video, dtype=dtype), [2, 3, 4])
        yield f"max_pool2d {kind}", aten.max_pool2d.default, (x(*image, dtype=dtype), [2, 2])
        tokens = x(size * 8, 4, 320, dtype=dtype).transpose(0, 1)
        yield f"linear of what is transposed {kind}", aten.linear.default, (tokens, x(1280, 320, dtype=dtype))
        yield f"layer_norm {kind}", aten.layer_norm.default, (x(4, size * 8, 320, dtype=dtype), [320])


def workspaces(bench: Bench) -> None:
    """What kernels allocate on the card, beside the bounds that stand in for one that isn't there."""
    for name, target, args in calls(bench.dry):
        with bench.check(f"workspace: {name}") as record:
            out = target(*args)
            trace = apart(partial(trace_of, target, args, {}, bench.device))
            made = sum(x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            record |= {"measured": workspace_of(trace, made), "bound": bound_bytes(target, out, args, {})}
            record["ok"] = bench.dry or record["measured"] <= 1.02 * record["bound"] + 2**20


def norms(bench: Bench) -> None:
    """A norm in one piece and in parts, by time and by its distance to float64."""
    shape = (1, 64, 4, 24, 32) if bench.dry else (1, 256, 14, 288, 512)
    for dtype in (torch.float16, torch.float32):
        with bench.check(f"norm: {str(dtype).removeprefix('torch.')}") as record:
            x = torch.randn(shape, device=bench.device, dtype=dtype) + 3
            weight, bias = torch.randn(2, shape[1], device=bench.device, dtype=dtype)

            def whole(x: Any = x, weight: Any = weight, bias: Any = bias) -> torch.Tensor:
                return torch.nn.functional.group_norm(x, 32, weight, bias)

            def parts(x: Any = x, weight: Any = weight, bias: Any = bias) -> torch.Tensor:
                norm = torch.ops.fxstream
                moments = norm.group_moments(x, 32)
                statistics_of = norm.group_statistics(moments, shape[1] // 32 * shape[-1], 1e-5)
                return norm.group_scale(x, statistics_of, weight, bias)

            for name, run in (("whole", whole), ("split", parts)):
                result, peak = bench.peaks(run)
                distance = relative_l2(result, whole(x.double(), weight.double(), bias.double()))
                record[name] = {**peak, "seconds": bench.median_seconds(run), "relative_l2": distance}


def small(bench: Bench) -> None:
    """Small models: exactness, and peaks predicted and measured."""
    for name in SMALL[: 1 if bench.dry else None]:
        for dtype in (torch.float32, torch.float16)[: 1 if bench.dry else None]:
            kind = str(dtype).removeprefix("torch.")
            with bench.check(f"small: {name} {kind}, eager") as record:
                size: dict[str, Any] = TINY if bench.dry else {}
                entry = catalogue.shallow(name)
                model, args, kwargs = catalogue.small(entry, dtype=dtype, device=bench.device, **size)
                reference, record["peak"] = bench.peaks(_caller(model, args, kwargs))
            for budget in bench.budgets:
                with bench.check(f"small: {name} {kind}, {budget}") as record:
                    _streamed(bench, record, model, args, kwargs, budget, reference)


def _caller(model: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], torch.Tensor]:
    return lambda: _tensor(model(*args, **kwargs))


def _tensor(value: Any) -> torch.Tensor:
    return next(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _streamed(
    bench: Bench, record: dict[str, Any], model: Any, args: Any, kwargs: Any, budget: Any, reference: Any
) -> Callable[[], Any]:
    began = time.perf_counter()
    streamed = fxstream.optimize(model, budget, args, kwargs)
    [plan] = streamed.plans
    record["planning_seconds"] = time.perf_counter() - began
    run = _caller(streamed, args, kwargs)
    result, peak = bench.peaks(run)
    bound = 1e-6 if reference.dtype == torch.float32 else 1e-3
    record |= {
        "planned": {"allocated": plan.after.peak_bytes, "reserved_in_all": getattr(plan.reserve, "reserved", None)},
        "measured": peak,
        "launches": plan.launches,
        "relative_l2": relative_l2(result, reference),
        "machine": plan.machine,
    }
    record["ok"] = record["relative_l2"] <= 5 * bound and peak["allocated"] <= 1.02 * plan.after.peak_bytes + 2**20
    return run


def large(bench: Bench) -> None:
    """Published models with random weights: peaks and times, eager, by torch.compile, and streamed."""
    for name in LARGE[: 1 if bench.dry else None]:
        with bench.check(f"large: {name}, eager") as record:
            if bench.dry:
                model, args, kwargs = catalogue.small(catalogue.shallow(name), **TINY)
            else:
                model, args, kwargs = catalogue.build(name, device=bench.device, fake=False)
            run = _caller(model, args, kwargs)
            reference, record["measured"] = bench.peaks(run)
            record["seconds"] = eager = bench.median_seconds(run)
        for budget in (*bench.budgets, "8GiB"):
            with bench.check(f"large: {name}, {budget}") as record:
                streamed = _streamed(bench, record, model, args, kwargs, budget, reference)
                record["over_eager"] = bench.median_seconds(streamed) / eager
        if not bench.dry:
            with bench.check(f"large: {name}, torch.compile") as record:
                compiled = _caller(torch.compile(model), args, kwargs)
                _, record["measured"] = bench.peaks(compiled)
                record["over_eager"] = bench.median_seconds(compiled) / eager


def pipeline(bench: Bench) -> None:
    """A pipeline whose process may reserve no more than it was planned to hold."""
    from fxstream.tools.pipelines import SVD_PIPELINE, made

    with bench.check(f"pipeline in {PIPELINE}") as record:
        if bench.dry:
            record["skipped"] = "its models are published ones"
            return
        with torch.device(bench.device), default_dtype(torch.float16):
            pipe = made(SVD_PIPELINE, {name: each.build().eval() for name, each in SVD_PIPELINE.modules.items()})
        pipe.to("cpu")
        pipe.enable_model_cpu_offload(device=bench.device)
        sizes = dict(SVD_PIPELINE.call)
        began = time.perf_counter()
        fxstream.optimize(pipe, PIPELINE, **sizes)
        plan = fxstream.plan(pipe)
        record["planning_seconds"] = time.perf_counter() - began
        record["stages"] = {stage.name: stage.total_bytes for stage in plan.stages}
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(((8 << 30) - CONTEXT) / total)
        image = torch.rand(1, 3, sizes["height"], sizes["width"])
        call = {**sizes, "image": image, "num_inference_steps": 2, "output_type": "pt"}
        result, record["measured"] = bench.peaks(lambda: pipe(**call).frames)
        record["finite"] = bool(_tensor(result).isfinite().all())


GROUPS: dict[str, Callable[[Bench], None]] = {
    each.__name__: each for each in (environment, workspaces, norms, small, large, pipeline)
}


def _run(group: str, bench: Bench) -> None:
    with torch.no_grad(), suppress(TimeoutError):
        GROUPS[group](bench)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fxstream.tools.bench_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny models on a CPU, to see that all of it works")
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"), help="the records (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="no check begins later (default: %(default)s)")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, by commas (default: %(default)s)")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    options = parser.parse_args()
    lines = options.out.with_suffix(".jsonl")
    if options.group:
        _run(options.group, Bench(options.dry, time.time() + options.seconds, lines))
        return
    if not (options.dry or torch.cuda.is_available()):
        sys.exit("there is no CUDA card here; --dry goes the same ways on the CPU")
    began, own = time.time(), [sys.executable, "-m", "fxstream.tools.bench_gpu", "--out", str(options.out)]
    lines.unlink(missing_ok=True)
    for group in options.only.split(","):
        left = options.seconds - (time.time() - began)
        if options.dry:
            _run(group, Bench(True, time.time() + left, lines))
            continue
        try:
            subprocess.run([*own, "--group", group, "--seconds", f"{left:.0f}"], timeout=max(left, 1) + 30)
        except subprocess.TimeoutExpired:
            print(f"FAIL {group}: ended", flush=True)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    options.out.write_text(json.dumps({"dry": options.dry, "records": records}, indent=1))
    lines.unlink()
    good = sum(record["ok"] for record in records)
    print(f"{good} of {len(records)} checks are good; {options.out}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
