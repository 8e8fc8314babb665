"""Quantized weights by the libraries that people use, and a table of what a streamed call of each holds.

Run with `make table-quantized`. The model is a transformer of video with Wan's structure and random weights, small
enough for any machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxstream.api import optimize
from fxstream.passes.graph.subclasses import weights_of
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak
from fxstream.tools.turns import take_turns

MIB = 2**20
HEADERS = ["weights", "weights MiB", "eager MiB", "streamed MiB", "planned MiB", "time", "relative L2"]
CONFIG = {
    **{"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64, "text_dim": 256, "ffn_dim": 2048},
    **{"in_channels": 16, "out_channels": 16},
}


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a model, each with the module that holds it and its name there."""
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    yield from ((parent, name, child) for parent, name, child in found if type(child) is nn.Linear)


def _torchao(config: str) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)())

    return quantize


def _quanto(kind: str) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        from optimum import quanto

        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)

    return quantize


FACTORS = {"Q4_K": slice(0, 4), "Q6_K": slice(-2, None)}
"""Where blocks that the gguf package can read but not make have their factors, in half precision."""


def _gguf(kind: str) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        for parent, name, old in linears(model):
            if old.in_features % block:
                continue
            if kind in FACTORS:
                data = torch.randint(256, (old.out_features, old.in_features // block, size), dtype=torch.uint8)
                factors = data[..., FACTORS[kind]]
                factors.view(torch.float16).fill_(1e-4)
                data = data.flatten(1)
            else:
                data = torch.from_numpy(gguf.quantize(old.weight.float().numpy(), number).copy())
            new = GGUFLinear(old.in_features, old.out_features, old.bias is not None, compute_dtype=old.weight.dtype)
            new.weight, new.bias = GGUFParameter(data, quant_type=number), old.bias
            setattr(parent, name, new)

    return quantize


def _bitsandbytes(bits: int) -> Callable[[nn.Module], None]:
    def quantize(model: nn.Module) -> None:
        import bitsandbytes

        nn_ = bitsandbytes.nn
        for parent, name, old in linears(model):
            sizes = old.in_features, old.out_features, old.bias is not None
            data, dtype = old.weight.data, old.weight.dtype
            new: Any
            if bits == 4:
                new = nn_.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
                new.weight = nn_.Params4bit(data, requires_grad=False, quant_type="nf4")
            else:
                new = nn_.Linear8bitLt(*sizes, has_fp16_weights=False)
                new.weight = nn_.Int8Params(data, requires_grad=False, has_fp16_weights=False)
            new.bias = old.bias
            setattr(parent, name, new.to("cpu"))

    return quantize


def _casting(model: nn.Module) -> None:
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.bfloat16)


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "bfloat16": lambda model: None,
    "layerwise casting to float8": _casting,
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8, activations too": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": _torchao("Float8WeightOnlyConfig"),
    "quanto qint8": _quanto("qint8"),
    "quanto qfloat8": _quanto("qfloat8"),
    "GGUF Q8_0": _gguf("Q8_0"),
    "GGUF Q6_K": _gguf("Q6_K"),
    "GGUF Q4_K": _gguf("Q4_K"),
    "GGUF Q4_0": _gguf("Q4_0"),
    "bitsandbytes 8 bit": _bitsandbytes(8),
    "bitsandbytes 4 bit": _bitsandbytes(4),
}
"""Each quantizes the linear layers of a model in place."""


@dataclass(frozen=True)
class Facts:
    """What one way to run a model held, in bytes; ``distance`` is that of a streamed result to the model's own."""

    weight_bytes: int
    peak_bytes: int
    planned_bytes: int = 0
    distance: float = 0.0


def transformer(kind: str) -> tuple[Any, dict[str, Any]]:
    """The model with weights of a kind, and keyword arguments to call it with."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = nn.Module.to(WanTransformer3DModel(**CONFIG).eval().requires_grad_(False), torch.bfloat16)
    KINDS[kind](model.blocks)
    made = torch.Generator().manual_seed(1)
    video, prompt = torch.randn(1, 16, 5, 32, 48, generator=made), torch.randn(1, 64, 256, generator=made)
    call = {"hidden_states": video.bfloat16(), "encoder_hidden_states": prompt.bfloat16()}
    return model, {**call, "timestep": torch.tensor([500]), "return_dict": False}


def prepare(way: str) -> tuple[Callable[[], Any], Facts]:
    """``eager KIND`` or ``streamed KIND``, in a process of its own."""
    torch.set_grad_enabled(False)
    how, _, kind = way.partition(" ")
    model, call = transformer(kind)
    [expected] = model(**call)  # and what the first call sets up
    weights = sum(tensor.nbytes for tensor in weights_of(model))
    if how == "eager":
        return lambda: model(**call), Facts(weights, measure_peak(model, **call).peak_bytes)
    streamed = optimize(model, memory_budget=0.5)
    streamed(**call)
    measured = measure_peak(streamed, **call)
    distance = relative_l2(measured.result[0], expected)
    planned = streamed.plans[0].after.peak_bytes
    return lambda: streamed(**call), Facts(weights, measured.peak_bytes, planned, distance)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure streamed calls of models with quantized weights.")
    parser.add_argument("kinds", metavar="KIND", nargs="*", help=f"all without: {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for kind in options.kinds or KINDS:
        turns = take_turns(prepare, [f"eager {kind}", f"streamed {kind}"], options.rounds)
        eager, streamed = turns.values()
        sizes = eager.facts.weight_bytes, eager.facts.peak_bytes, streamed.facts.peak_bytes
        mib = [f"{size / MIB:.2f}" for size in (*sizes, streamed.facts.planned_bytes)]
        rows.append([kind, *mib, f"{streamed.over(eager):.2f}", f"{streamed.facts.distance:.1e}"])
    print(tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
