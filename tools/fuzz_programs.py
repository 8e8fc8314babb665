"""Random programs: modules as source code, drawn line by line and tried on real tensors while they are.

A line is a call of an operator of the catalogue or of its kin, on values that are there: convolutions of every kind,
norms, attention, products, reshapes that merge and split axes, shifts, padding, pooling, reductions, indexing, writes
in place, random draws, state. A line that fails, or whose result is too large or too extreme to compare, is drawn anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST = 100_000
"""Elements of the largest value of a program."""

EXTREME = 30.0
"""No value of a program is larger."""


@dataclass(frozen=True)
class Line:
    """A line of a module's forward: the name that it makes ("" where it writes alone), those that it reads.

    ``attributes`` are the lines of the constructor that it needs.
    """

    code: str
    makes: str
    reads: frozenset[str]
    attributes: tuple[str, ...] = ()

    def renamed(self, name: str, other: str) -> Line:
        """The line, reading another value."""
        code = re.sub(rf"\b{name}\b", other, self.code)
        return Line(
            code, self.makes, frozenset(other if each == name else each for each in self.reads), self.attributes
        )


@dataclass(frozen=True)
class Program:
    """A module as source code, the inputs to call it with, and how it is optimized.

    ``inputs`` are (name, expression), in which earlier ones may be named. ``budget`` is as for ``optimize``; with
    ``as_bytes`` it is a share, to be given as bytes.
    """

    seed: int
    inputs: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    results: tuple[str, ...]
    budget: str | float
    as_bytes: bool = False
    allow_recompute: bool = False

    def module_source(self) -> str:
        """The definition of the class ``Program``."""
        attributes = [f"        {code}" for line in self.lines for code in line.attributes]
        names = [name for name, _ in self.inputs]
        body = [f"        {line.code}" for line in self.lines]
        return "\n".join(
            [
                "class Program(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *attributes,
                "",
                f"    def forward(self, {', '.join(names)}):",
                *body,
                f"        return {', '.join(self.results)}{',' if len(self.results) == 1 else ''}",
            ]
        )

    def inputs_source(self) -> str:
        """Lines that make the inputs."""
        return "\n".join(f"{name} = {code}" for name, code in self.inputs)

    def source(self, budget: Any = None) -> str:
        """All of it, as a script that shows whether the optimized module does what the module does."""
        names = ", ".join(name for name, _ in self.inputs)
        again = ", allow_recompute=True" if self.allow_recompute else ""
        given = repr(self.budget if budget is None else budget)
        return "\n".join(
            [
                "import copy",
                "",
                "import torch",
                "from torch import nn",
                "from torch.nn import functional as F",
                "",
                "import fxstream",
                "from fxstream.tools.measure import measure_peak",
                "",
                "",
                self.module_source(),
                "",
                "",
                "def inputs():",
                f"    torch.manual_seed({self.seed})",
                *(f"    {name} = {code}" for name, code in self.inputs),
                f"    return [{names}]",
                "",
                "",
                f"torch.manual_seed({self.seed})",
                "torch.set_grad_enabled(False)",
                "model = Program().requires_grad_(False).eval()",
                f"streamed = fxstream.optimize(copy.deepcopy(model), {given}, example_args=inputs(){again})",
                "args, own = inputs(), inputs()",
                "torch.manual_seed(1)",
                "found = streamed(*args)",
                "torch.manual_seed(1)",
                "for got, wanted in zip([*found, *args], [*model(*own), *own], strict=True):",
                "    print(tuple(got.shape), got.dtype, float((got.double() - wanted.double()).norm()))",
                "print(streamed.plans[0])",
                'print("planned", streamed.plans[0].after.peak_bytes, "of", streamed.plans[0].before.peak_bytes)',
                'print("measured", measure_peak(streamed, *inputs()).peak_bytes)',
            ]
        )


Names = dict[str, Tensor]
Drawn = str | tuple[str, str]
"""An expression on ``{x}``, or a statement (begins with "!"); maybe with the expression of an attribute ``{m}``."""

Family = Callable[["Drawer", Tensor], Drawn]
FAMILIES: list[tuple[int, Family]] = []


def family(weight: int) -> Callable[[Family], Family]:
    """Register a way to draw a line on a value, to be taken with this weight."""

    def register(function: Family) -> Family:
        FAMILIES.append((weight, function))
        return function

    return register


def draw_program(seed: int) -> Program:
    """The program of a seed."""
    return Drawer(Random(seed), seed).program()


class Refused(Exception):
    """A family has nothing for this value."""


class Drawer:
    """Draws one program; ``values`` are those that its lines have made so far."""

    def __init__(self, random: Random, seed: int) -> None:
        self.random, self.seed = random, seed
        self.values: Names = {}
        self.module = nn.Module()
        self.lines: list[Line] = []
        self.inputs: list[tuple[str, str]] = []

    def program(self) -> Program:
        torch.manual_seed(self.seed)
        with torch.no_grad():
            for name in "ab"[: self.pick((1, 1, 2))]:
                self._draw_input(name)
            wanted = self.random.randint(2, 8)
            for _ in range(20 * wanted):
                if len(self.lines) < wanted:
                    self._draw_line()
        kind = self.pick(("min", "min", "share", "share", "bytes"))
        return Program(
            self.seed,
            tuple(self.inputs),
            tuple(self.lines),
            self._results(),
            "min" if kind == "min" else round(self.random.uniform(0.2, 0.95), 2),
            as_bytes=kind == "bytes",
            allow_recompute=self.random.random() < 0.3,
        )

    def pick(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def maybe(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def dim(self, x: Tensor) -> int:
        need(x.dim() > 0)
        return self.random.randrange(x.dim())

    def dims(self, x: Tensor, most: int = 3) -> list[int]:
        need(x.dim() > 0)
        return sorted(self.random.sample(range(x.dim()), self.random.randint(1, min(most, x.dim()))))

    def divisor(self, size: int, least: int = 1) -> int:
        """A divisor of a size, from ``least`` on."""
        found = [n for n in range(least, size + 1) if size % n == 0]
        if not found:
            raise Refused
        return self.pick(found)

    def other(self, fits: Callable[[Tensor], bool]) -> str:
        """The name of a value that fits."""
        found = [name for name, value in self.values.items() if fits(value)]
        if not found:
            raise Refused
        return self.pick(found)

    def _draw_input(self, name: str) -> None:
        if self.inputs and self.maybe(0.3):
            first = self.values["a"]
            code = self.pick((f"a[{self.random.randrange(first.shape[0])}]", "a", "a.transpose(0, 1)", "a + 1"))
        elif self.inputs and self.maybe(0.5):
            code = f"torch.randn({list(self.values['a'].shape)})"
        else:
            sizes = [self.pick((1, 2, 2, 3, 5)), self.pick((4, 6, 8, 12, 16))]
            rest = self.pick((0, 1, 1, 2, 2, 2, 2, 3))
            sides = {0: (), 1: (64, 130, 256, 500), 2: (10, 15, 16, 24, 33), 3: (4, 6, 7, 10)}[rest]
            sizes += [self.pick(sides) for _ in range(rest)] if rest else [64]
            order = self.random.sample(range(len(sizes)), len(sizes))
            back = [order.index(dim) for dim in range(len(sizes))]
            code = f"torch.randn({sizes})"
            if self.maybe(0.2):
                code = f"torch.randn({[sizes[dim] for dim in order]}).permute({back})"
        self.values[name] = eval(code, {"torch": torch, **self.values})
        self.inputs.append((name, code))

    def _draw_line(self) -> None:
        latest = list(self.values)[-3:] if self.maybe(0.8) else list(self.values)
        name = self.pick(latest)
        weights, families = zip(*FAMILIES, strict=True)
        [chosen] = self.random.choices(families, weights)
        try:
            drawn = chosen(self, self.values[name])
        except Refused:
            return
        code, attribute = (drawn, "") if isinstance(drawn, str) else drawn
        number = len(self.lines)
        code = code.replace("{x}", name).replace("{m}", f"self.m{number}")
        made = "" if code.startswith("!") else f"v{number}"
        code = code.removeprefix("!") if not made else f"{made} = {code}"
        attributes = (attribute.replace("{m}", f"self.m{number}").replace("{n}", f"m{number}"),) if attribute else ()
        names = frozenset(re.findall(r"\b[abv]\d*\b", code.split(" = ", 1)[-1] if made else code)) & self.values.keys()
        self._try(Line(code, made, names, attributes))

    def _try(self, line: Line) -> None:
        """Take a line if it runs, and what it makes, writes or keeps is neither large nor extreme.

        Nor is it near zero, as the mean of a norm is: that is rounding alone.
        """
        state, before = torch.get_rng_state(), {name: value.clone() for name, value in self.values.items()}
        name = f"m{len(self.lines)}"
        if hasattr(self.module, name):  # of a line that wasn't taken
            delattr(self.module, name)
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "self": self.module, **self.values}
        try:
            for attribute in line.attributes:
                exec(attribute, space)
            self.module.eval()
            exec(line.code, space)
            kept = [value for own, value in self.module.named_buffers(recurse=False) if own == name]
            fine = all(map(_is_fine, [*kept, *(space[each] for each in {*self.values, line.makes} - {""})]))
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, AssertionError):
            fine = False
        if not fine:
            torch.set_rng_state(state)
            for name, value in self.values.items():
                if not torch.equal(value, before[name]):
                    value.copy_(before[name])
            return
        self.lines.append(line)
        if line.makes:
            self.values[line.makes] = space[line.makes]

    def _results(self) -> tuple[str, ...]:
        """The last value, others that nothing reads, and at times one more, which may be an input."""
        made = [line.makes for line in self.lines if line.makes] or [self.inputs[0][0]]
        read = frozenset[str]().union(*(line.reads for line in self.lines))
        unread = [name for name in made[:-1] if name not in read]
        results = [made[-1], *self.random.sample(unread, min(len(unread), self.random.randint(0, 3)))]
        if self.maybe(0.2):
            results.append(self.pick([*made, *self.values]))
        return tuple(results)


def _is_fine(value: Any) -> bool:
    if not isinstance(value, Tensor) or not 0 < value.numel() <= MOST or value.dtype == torch.float64:
        return False
    if not value.is_floating_point():
        return not value.is_complex()
    return bool(value.isfinite().all()) and 1e-3 < float(value.abs().max()) < EXTREME


def is_image(x: Tensor, low: int = 3, high: int = 5) -> bool:
    return low <= x.dim() <= high and x.is_floating_point()


def need(condition: bool) -> None:
    """Refuse a value that a family can do nothing with."""
    if not condition:
        raise Refused


# Pointwise


def listed(text: str) -> list[str]:
    """The expressions of a text, one after a bar or a new line."""
    return [code for line in text.strip().splitlines() for code in line.split("|")]


UNARY = listed("""
F.silu({x})|F.gelu({x})|F.gelu({x}, approximate="tanh")|F.relu({x})|F.relu6({x})|F.leaky_relu({x}, 0.1)|F.elu({x})
F.mish({x})|F.softplus({x})|F.hardswish({x})|F.hardsigmoid({x})|F.hardtanh({x})|F.logsigmoid({x})|F.softsign({x})
F.selu({x})|F.celu({x})|F.softshrink({x})|F.hardshrink({x})|F.tanhshrink({x})|{x}.sigmoid()|{x}.tanh()|{x}.sin()
{x}.cos()|{x}.abs()|{x}.neg()|{x}.square()|{x}.clamp(max=1.5).exp()|({x}.abs() + 0.5).sqrt()|({x}.abs() + 0.5).rsqrt()
({x}.abs() + 0.5).log()|{x} * 2|2 - {x}|{x} + 1|{x} / 3|1 / ({x}.abs() + 1)|{x}.clamp(-1, 1)|{x}.erf()|{x}.erfc()
{x}.atan()|{x}.asinh()|{x}.sgn() + {x}|{x}.clone()|{x}.contiguous()|{x}.detach()|torch.where({x} > 0, {x}, {x} * 0.3)
{x}.masked_fill({x} > 1, 0.5)|torch.nan_to_num({x})|torch.hypot({x}, {x} + 1)|torch.copysign({x}, {x} - 0.3)
torch.logaddexp({x}, {x} * 0.5)|torch.xlogy({x}, {x}.abs() + 1)|torch.sinc({x})|torch.lerp({x}, {x} * 2, 0.3)
torch.addcmul({x}, {x}, {x}, value=0.1)|{x}.to(torch.bfloat16).float()|({x} > 0).float() + {x}|{x}.float().type_as({x})
F.threshold({x}, 0.1, 0.2)|{x} * torch.sigmoid({x}.mean())|F.dropout({x}, 0.2, self.training)
torch.zeros_like({x}) + {x}|torch.full_like({x}, 0.5) * {x}|{x}.pow(2)|{x}.float_power(2).float()
torch.atan2({x}, {x}.abs() + 1)|{x}.expm1().clamp(max=4)
""")
BINARY = listed("""
{x} + {y}|{x} * {y}|{x} - {y}|{x} / ({y}.abs() + 1)|torch.maximum({x}, {y})|torch.where({x} > {y}, {x}, {y} * 0.5)
torch.lerp({x}, {y}, 0.3)|torch.hypot({x}, {y})|torch.addcmul({x}, {y}, {y})|torch.stack([{x}, {y}]).amax(0)
{y}.add({x}, alpha=0.5)|torch.copysign({x}, {y})|torch.atan2({x}, {y}.abs() + 1)|torch.fmin({x}, {y})
{x} * torch.sigmoid({y})
""")


@family(14)
def unary(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    return draw.pick(UNARY)


@family(10)
def binary(draw: Drawer, x: Tensor) -> Drawn:
    def broadcasts(y: Tensor) -> bool:
        pairs = zip(reversed(x.shape), reversed(y.shape), strict=False)
        return y.is_floating_point() and all(p == q or 1 in (p, q) for p, q in pairs)

    return draw.pick(BINARY).replace("{y}", draw.other(broadcasts))


@family(2)
def factor_a_channel(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x, 2))
    if draw.maybe(0.4):
        return "F.prelu({x}, {m})", f"{{m}} = nn.Parameter(torch.rand({draw.pick((1, x.shape[1]))}))"
    dim = draw.dim(x)
    sizes = [size if at == dim else 1 for at, size in enumerate(x.shape)]
    return "{x} * {m} + {m}", f"{{m}} = nn.Parameter(torch.rand({sizes}))"


# Convolutions, pooling, resampling


@family(16)
def convolution(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x))
    rank, channels = x.dim() - 2, x.shape[1]
    kernel = [draw.pick((1, 2, 3, 3, 4, 5, 7)) for _ in range(rank)]
    mode = draw.pick(("zeros", "zeros", "zeros", "circular", "reflect", "replicate"))
    stride = [draw.pick((1, 1, 1, 2, 3)) for _ in range(rank)]
    padding: Any = [draw.random.randint(0, 3) for _ in range(rank)]
    if draw.maybe(0.2):
        stride, padding = [1] * rank, draw.pick(("same", "valid"))
    groups = draw.pick((1, 1, 1, draw.divisor(channels), channels))
    features = groups * draw.pick((1, 1, 2, 3)) if groups > 1 else draw.pick((2, 4, 8, 12, 16))
    dilation = [draw.pick((1, 1, 1, 2)) for _ in range(rank)]
    options = f"stride={stride}, padding={padding!r}, dilation={dilation}, groups={groups}, padding_mode={mode!r}"
    return "{m}({x})", f"{{m}} = nn.Conv{rank}d({channels}, {features}, {kernel}, {options}, bias={draw.maybe(0.7)})"


@family(3)
def transposed_convolution(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x))
    rank, channels = x.dim() - 2, x.shape[1]
    groups = draw.pick((1, 1, draw.divisor(channels)))
    features = groups * draw.pick((1, 2, 3))
    kernel, stride, padding = ([draw.random.randint(*b) for _ in range(rank)] for b in ((1, 4), (1, 3), (0, 2)))
    extra = [draw.random.randrange(step) for step in stride]
    options = f"{kernel}, {stride}, {padding}, {extra}, groups={groups}, dilation={draw.pick((1, 1, 2))}"
    return "{m}({x})", f"{{m}} = nn.ConvTranspose{rank}d({channels}, {features}, {options})"


@family(5)
def pooling(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x))
    rank = x.dim() - 2
    kernel, stride = draw.pick((2, 3)), draw.pick((1, 2, 3))
    padding, ceil = draw.random.randint(0, kernel // 2), draw.maybe(0.3)
    options = f"{kernel}, {stride}, {padding}, ceil_mode={ceil}"
    return draw.pick(
        (
            f"F.max_pool{rank}d({{x}}, {options})",
            f"F.max_pool{rank}d({{x}}, {options}, return_indices=True)[0]",
            f"F.avg_pool{rank}d({{x}}, {options}, count_include_pad={draw.maybe()})",
            f"F.adaptive_avg_pool{rank}d({{x}}, {draw.pick((1, 2, 5))})",
            f"F.adaptive_max_pool{rank}d({{x}}, {draw.pick((1, 2, 5))})",
        )
    )


@family(4)
def resampling(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x))
    rank = x.dim() - 2
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    modes = ["nearest", "nearest", "nearest-exact", smooth, smooth, "area", *(["bicubic"] if rank == 2 else [])]
    mode = draw.pick(modes)
    corners = f", align_corners={draw.maybe(0.3)}" if mode in (smooth, "bicubic") else ""
    if mode == "area" or draw.maybe(0.4):
        return f"F.interpolate({{x}}, size={[draw.pick((8, 12, 15, 20)) for _ in range(rank)]}, mode={mode!r}{corners})"
    return f"F.interpolate({{x}}, scale_factor={draw.pick((2.0, 2.0, 3.0, 1.5, 0.5))}, mode={mode!r}{corners})"


@family(3)
def shuffled(draw: Drawer, x: Tensor) -> Drawn:
    need(x.dim() == 4)
    code = draw.pick(
        ("pixel_shuffle({x}, 2)", "pixel_unshuffle({x}, 2)", "channel_shuffle({x}, 2)", "unfold({x}, 3, padding=1)")
    )
    return f"F.{code}"


# Norms


@family(8)
def norm(draw: Drawer, x: Tensor) -> Drawn:
    need(is_image(x, 2))
    channels, affine = x.shape[1], draw.maybe(0.7)
    kind = draw.random.randrange(8)
    if kind < 2:
        return "{m}({x})", f"{{m}} = nn.GroupNorm({draw.divisor(channels)}, {channels}, affine={affine})"
    if kind < 4:
        sizes = list(x.shape[draw.random.randrange(1, x.dim()) :])
        which = draw.pick(("LayerNorm", "RMSNorm"))
        return "{m}({x})", f"{{m}} = nn.{which}({sizes}, elementwise_affine={affine})"
    dim = draw.dim(x)
    if kind == 4:
        return draw.pick(
            (
                f"{{x}}.softmax({dim})",
                f"{{x}}.log_softmax({dim})",
                f"F.normalize({{x}}, dim={dim})",
                f"F.glu({{x}}, {dim})",
            )
        )
    if kind == 5:
        return f"{{x}} / ({{x}}.pow(2).mean({draw.dims(x)}, keepdim=True) + 0.1).sqrt()"
    need(x.dim() > 2)
    if kind == 6:
        return "{m}({x})", f"{{m}} = nn.InstanceNorm{x.dim() - 2}d({channels}, affine={affine})"
    return "{m}({x})", f"{{m}} = nn.BatchNorm{x.dim() - 2}d({channels})"


# Products and attention


@family(6)
def product(draw: Drawer, x: Tensor) -> Drawn:
    need(x.dim() > 1 and x.is_floating_point())
    width, features = x.shape[-1], draw.pick((4, 8, 16, 32))
    scale = f"/ {round(width**0.5, 2)}"
    wide = f"{{m}} = nn.Parameter(torch.randn({width}, {features}))"
    return draw.pick(
        (
            ("{m}({x})", f"{{m}} = nn.Linear({width}, {features}, bias={draw.maybe()})"),
            ("{m}({x})", f"{{m}} = nn.Linear({width}, {features})"),
            (f"{{x}} @ {{m}} {scale}", wide),
            (f"torch.einsum('...i,ij->...j', {{x}}, {{m}}) {scale}", wide),
            (f"{{x}} @ {{x}}.transpose(-1, -2) {scale}", ""),
            (
                "F.silu({m}({x}))",
                f"{{m}} = nn.Sequential(nn.Linear({width}, {features}), nn.GELU(), nn.Linear({features}, {width}))",
            ),
            (f"torch.tensordot({{x}}, {{m}}, 1) {scale}", wide),
        )
    )


@family(4)
def gated(draw: Drawer, x: Tensor) -> Drawn:
    need(x.dim() > 1 and x.is_floating_point())
    dim = draw.dim(x)
    need(x.shape[dim] > 1)
    half = x.shape[dim] // 2
    some = draw.random.randint(1, half)
    return draw.pick(
        (
            f"{{x}}.narrow({dim}, 0, {half}) * F.gelu({{x}}.narrow({dim}, {x.shape[dim] - half}, {half}))",
            f"(lambda p: p[0] * p[-1])({{x}}.chunk(2, {dim}))",
            f"(lambda p: p[-1].sigmoid() + p[0].narrow({dim}, 0, p[-1].shape[{dim}]))({{x}}.split({some}, {dim}))",
            f"(lambda p: p[0] + p[1])({{x}}.unbind({dim}))",
        )
    )


@family(5)
def attention(draw: Drawer, x: Tensor) -> Drawn:
    need(3 <= x.dim() <= 4 and x.is_floating_point())
    length, width = x.shape[-2:]
    mask = f", attn_mask=torch.ones({length}, {length}, dtype=torch.bool).tril()"
    options = draw.pick(("", "", ", is_causal=True", mask))
    code = [
        f"F.scaled_dot_product_attention({{x}}, {{x}}, {{x}}{options})",
        f"F.scaled_dot_product_attention({{x}}, {{x}} * 0.5, {{x}} + 1{options})",
        f"({{x}} @ {{x}}.mT * {round(width**-0.5, 3)}).softmax(-1) @ {{x}}",
    ]
    if x.dim() == 3:
        heads = draw.divisor(width)
        parts = f"(lambda h: F.scaled_dot_product_attention(h, h, h{options}).transpose(1, 2).flatten(2))"
        code.append(f"{parts}({{x}}.unflatten(-1, ({heads}, {width // heads})).transpose(1, 2))")
        batch = f"{x.shape[0]}, {length}, {length}"
        scores = f"torch.baddbmm(torch.empty({batch}), {{x}}, {{x}}.transpose(1, 2), beta=0, alpha=0.1)"
        code.append(f"torch.bmm({scores}.softmax(-1), {{x}})")
    return draw.pick(code)


@family(1)
def recurrent(draw: Drawer, x: Tensor) -> Drawn:
    need(x.dim() == 3 and x.shape[1] <= 64)
    return "{m}({x})[0]", f"{{m}} = nn.{draw.pick(('GRU', 'LSTM'))}({x.shape[2]}, 8, batch_first=True)"


# Moving elements


@family(14)
def reshaped(draw: Drawer, x: Tensor) -> Drawn:
    dim = draw.dim(x)
    end = draw.random.randrange(dim, x.dim())
    order = draw.random.sample(range(x.dim()), x.dim())
    factor = draw.divisor(x.shape[dim])
    sizes = [factor, x.shape[dim] // factor]
    loose = list(_factored(draw, x.numel()))
    code = [
        f"{{x}}.flatten({dim}, {end})",
        f"{{x}}.unflatten({dim}, {draw.pick((sizes, sizes[::-1]))})",
        f"{{x}}.permute({order})",
        f"{{x}}.permute({order}).contiguous()",
        f"{{x}}.permute({order}).reshape({loose})",
        f"{{x}}.permute({order}).flatten({dim}, {end})",
        f"{{x}}.reshape({loose})",
        f"{{x}}.transpose({dim}, {end})",
        f"{{x}}.movedim({dim}, {end})",
        f"{{x}}.unsqueeze({dim})",
        f"{{x}}.squeeze({dim})",
        f"{{x}}.unflatten({dim}, {sizes}).transpose({dim}, {dim + 1}).flatten({dim}, {dim + 1})",
        f"{{x}}.unsqueeze({dim}).expand({[*x.shape[:dim], draw.pick((2, 3)), *x.shape[dim:]]})",
        f"{{x}}.swapaxes({dim}, -1).reshape({loose})",
        f"{{x}}.view({loose})",
    ]
    return draw.pick(code)


def _factored(draw: Drawer, size: int) -> Iterator[int]:
    """A size as the product of two to four others."""
    for _ in range(draw.random.randint(1, 3)):
        factor = draw.divisor(size)
        size //= factor
        yield factor
    yield size


@family(10)
def moved(draw: Drawer, x: Tensor) -> Drawn:
    dim, second = draw.dim(x), draw.dim(x)
    size = x.shape[dim]
    start = draw.random.randrange(size)
    stop = draw.random.randint(start + 1, size)
    positions = [draw.random.randrange(size) for _ in range(draw.pick((1, size, size + 2)))]
    every = ", ".join([":"] * dim)
    before = f"{every}, " if every else ""
    code = [
        f"{{x}}.narrow({dim}, {start}, {stop - start})",
        f"{{x}}[{before}{start}:]",
        f"{{x}}[{before}:{stop}]",
        f"{{x}}[{before}::2]",
        f"{{x}}[{before}{start}]",
        f"{{x}}.select({dim}, {start})",
        f"{{x}}.flip({dim})",
        f"{{x}}.roll({draw.random.randint(-3, 3)}, {dim})",
        f"{{x}}.roll(({draw.random.randint(-3, 3)}, 1), ({dim}, {second}))",
        f"{{x}}.rot90(1, ({dim}, {second}))",
        f"{{x}}.repeat_interleave({draw.pick((2, 3))}, {dim})",
        f"{{x}}.repeat({[draw.pick((1, 1, 2)) for _ in x.shape]})",
        f"{{x}}.tile({draw.pick((1, 2))})",
        f"{{x}}.index_select({dim}, torch.tensor({positions}))",
        f"{{x}}[{before}torch.tensor({positions})]",
        f"{{x}}.gather({dim}, torch.zeros({list(x.shape)}, dtype=torch.long))",
        f"{{x}}.index_fill({dim}, torch.tensor([{start}]), 0.5)",
        f"{{x}}.unfold({dim}, {draw.random.randint(1, min(size, 3))}, {draw.pick((1, 2))})",
        f"{{x}}.diff(dim={dim})",
        "{x}.tril()",
        f"{{x}}.slice_scatter({{x}}.narrow({dim}, {start}, {stop - start}) * 2, {dim}, {start}, {stop})",
    ]
    return draw.pick(code)


@family(6)
def padded(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    mode = draw.pick(("constant", "constant", "reflect", "replicate", "circular"))
    ranks = (1, 2, 3) if mode == "constant" else (max(1, min(3, x.dim() - 2)),)
    widths = [draw.random.randint(-1 if mode == "constant" else 0, 3) for _ in range(2 * draw.pick(ranks))]
    return f"F.pad({{x}}, {widths}, mode={mode!r})"


@family(6)
def joined(draw: Drawer, x: Tensor) -> Drawn:
    dim = draw.dim(x)

    def fits(y: Tensor) -> bool:
        same = all(p == q for at, (p, q) in enumerate(zip(x.shape, y.shape, strict=False)) if at != dim)
        return y.dim() == x.dim() and same and y.dtype == x.dtype

    other = draw.other(fits)
    ways = [f"torch.cat([{{x}}, {other}], {dim})", f"torch.cat([{other}, {{x}}, {other}], {dim})"]
    if draw.values[other].shape == x.shape:
        ways.append(f"torch.stack([{{x}}, {other}], {dim})")
    return draw.pick(ways)


# Reductions


@family(7)
def reduced(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    dims, dim, keep = draw.dims(x), draw.dim(x), draw.maybe(0.6)
    several = [
        *(f"{{x}}.{name}({dims}, keepdim={keep})" for name in ("mean", "amax", "amin", "logsumexp", "nanmean")),
        f"{{x}}.sum({dims}, keepdim={keep}) / 50",
        f"{{x}}.var({dims}, correction=0, keepdim={keep})",
        f"torch.linalg.vector_norm({{x}}, 2, {dims}, keepdim={keep}) / 10",
        f"torch.var_mean({{x}}, {dims}, correction=0, keepdim={keep})[1]",
        f"{{x}} - {{x}}.mean({dims}, keepdim=True)",
        f"{{x}} * torch.sigmoid({{x}}.amax({dims}, keepdim=True))",
    ]
    one = [
        *(f"{{x}}.{name}({dim}, keepdim={keep})[0]" for name in ("max", "min", "median", "mode")),
        *(f"{{x}}.{name}({dim})[0]" for name in ("sort", "cummax", "cummin")),
        f"{{x}}.cumsum({dim}) / 10",
        f"{{x}}.topk({draw.random.randint(1, x.shape[dim])}, {dim})[0]",
        f"{{x}}.kthvalue({draw.random.randint(1, x.shape[dim])}, {dim})[0]",
        f"{{x}}.aminmax(dim={dim}, keepdim={keep})[0]",
        "{x}.mean() + {x}",
        "{x}.norm() / 100 * {x}",
    ]
    return draw.pick(draw.pick((several, one)))


# Complex numbers


@family(2)
def spectral(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point() and x.dim() > 1)
    pairs = "torch.complex({x}, {x} * 0.5)"
    return draw.pick(
        (
            "torch.fft.rfft({x}).abs() / 10",
            "torch.fft.irfft2(torch.fft.rfft2({x}) * 0.5)",
            f"torch.view_as_real({pairs} * 0.5)",
            f"(lambda w: (w * w.conj()).real)({pairs})",
            f"{pairs}.conj().imag",
            f"torch.view_as_real({pairs}.conj().clone())",
            "(lambda w: w.real + w.imag)(torch.polar({x}.abs(), {x}))",
        )
    )


# Writes, draws and state


@family(8)
def written(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    dim = draw.dim(x)
    size = x.shape[dim]
    start = draw.random.randrange(size)
    stop = draw.random.randint(start + 1, size)
    part = ", ".join([":"] * dim + [draw.pick((f"{start}:{stop}", f"{start}", "::2", f"{start}:"))])
    ways = [
        "{x}.add_(0.5)",
        "{x}.mul_(0.5)",
        "{x}.clamp_(-1, 1)",
        "F.relu_({x})",
        f"{{x}}[{part}] = 0.25",
        f"{{x}}[{part}] += 0.5",
        f"{{x}}[{part}] *= 2",
        f"{{x}}.narrow({dim}, {start}, {stop - start}).mul_(2)",
        f"{{x}}.transpose({dim}, -1).add_(0.1)",
        f"{{x}}.select({dim}, {start}).fill_(0.5)",
        "{x}.view(-1)[::3].zero_()",
        "{x}.masked_fill_({x} > 1, 0.1)",
        "{x}[{x} > 1] = 0.1",
        "{x}.copy_({x}.flip(0))",
        f"{{x}}[{part}] = {{x}}[{part}].flip(0)",
        f"{{x}}.copy_({draw.other(lambda y: y.shape == x.shape and y.dtype == x.dtype)} * 0.5)",
        "F.dropout({x}, 0.3, self.training).add_(0.3)",
    ]
    return "!" + draw.pick(ways)


@family(3)
def drawn(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    return draw.pick(
        (
            "{x} + torch.randn_like({x})",
            "{x} * torch.rand({x}.shape)",
            "F.dropout({x}, 0.3, True)",
            "torch.bernoulli({x}.sigmoid()) + {x}",
            "!torch.randn(3)",
            "{x} + torch.randn({x}.shape[-1])",
            "{x}.clone().uniform_() + {x}",
            "!{x}.add_(torch.randn_like({x}))",
        )
    )


@family(3)
def kept(draw: Drawer, x: Tensor) -> Drawn:
    need(x.is_floating_point())
    zero = "self.register_buffer('{n}', torch.zeros(()))"
    like = f"self.register_buffer('{{n}}', torch.zeros({list(x.shape)}))"
    return draw.pick(
        (
            ("!{m}.add_({x}.mean())", zero),
            ("!{m} += {x}.amax()", zero),
            ("{x} + {m}.mul_(0.9).add_({x}.mean())", zero),
            ("{x} + {m}.add_(1)", zero),
            ("!{m}.copy_({x} * 0.5)", like),
            ("{x} + {m}.lerp_({x}, 0.5)", like),
        )
    )
