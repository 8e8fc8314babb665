"""Example inputs for a diffusers model that the catalogue doesn't know, from its signature and configuration.

`BUILDERS` maps the names of arguments, which diffusers' models share, to what is passed in them. Where the latent's
channels, frames and pixels lie in its dimensions is not told by a signature: each layout is tried on fake tensors, and
the first is taken that runs and gives back what it was given, channels apart.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fxstream.tools.catalogue import Inputs, Shape
from fxstream.tools.errors import UsageError, one_line

REMEDY = "write a function that returns (model, args, kwargs) and pass it as package.module:function"

CLIP_TOKENS, T5_TOKENS = 77, 256
"""Length of a prompt, where the configuration doesn't say."""

COMPRESSION = {
    "Allegro": (4, 8),
    "CogVideoX": (4, 8),
    "ConsisID": (4, 8),
    "Cosmos": (8, 8),
    "EasyAnimate": (4, 8),
    "Magvit": (4, 8),
    "HunyuanVideo": (4, 8),
    "LTX": (8, 32),
    "Mochi": (6, 8),
    "SanaVideo": (4, 8),
    "SanaTransformer2D": (1, 32),
    "AutoencoderDC": (1, 32),
    "SkyReels": (4, 8),
    "Wan": (4, 8),
}
"""What a latent's step stands for, in frames and in pixels, by a part of the class's name; elsewhere 1 and 8.

From the configurations of the autoencoders that were published with them.
"""


@dataclass(frozen=True)
class Asked:
    """What inputs are made for: a model's configuration and the size of the call.

    ``frames``, ``height`` and ``width`` are those of the latent; ``layout`` is one of `LAYOUTS`.
    """

    config: Mapping[str, Any]
    batch: int
    frames: int
    height: int
    width: int
    dtype: torch.dtype
    layout: str

    def first(self, *names: str) -> Any:
        """The first of a configuration's values that is set; of a list its first entry."""
        for name in names:
            value = self.config.get(name)
            if value is not None:
                return next(iter(value), None) if isinstance(value, (list, tuple)) else value
        return None

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


FRAMES = "batch x frames, channels, height, width"
TOKENS = "batch, tokens, channels"
PATCHES = "batch x frames, tokens of 2 x 2, channels"
LAYOUTS: dict[str, Callable[[Asked, int], tuple[int, ...]]] = {
    "batch, channels, frames, height, width": lambda a, c: (a.batch, c, *a.sizes),
    "batch, frames, channels, height, width": lambda a, c: (a.batch, a.frames, c, a.height, a.width),
    FRAMES: lambda a, c: (a.batch * a.frames, c, a.height, a.width),
    TOKENS: lambda a, c: (a.batch, prod(a.sizes), c),
    PATCHES: lambda a, c: (a.batch * a.frames, (a.height // 2) * (a.width // 2), c),
}
"""Shapes of a latent with its channels, in the order in which they are tried."""

IMAGES = (FRAMES, PATCHES)
"""The layouts of models that see each frame alone."""


def latent(asked: Asked) -> torch.Tensor | None:
    channels = asked.first("in_channels", "latent_channels", "z_dim")
    return None if channels is None else asked.noise(*LAYOUTS[asked.layout](asked, channels))


def code(asked: Asked) -> torch.Tensor | None:
    """What an autoencoder decodes."""
    channels = asked.first("latent_channels", "z_dim", "z_channels", "latent_dim")
    return None if channels is None else asked.noise(*LAYOUTS[asked.layout](asked, channels))


def _tokens(asked: Asked) -> int:
    return asked.first("max_text_seq_length", "text_len") or (
        CLIP_TOKENS if asked.first("cross_attention_dim") and not asked.first("caption_channels") else T5_TOKENS
    )


def _rows(asked: Asked) -> int:
    """How many samples the model sees: frames are samples of their own to an image model."""
    return asked.batch * asked.frames if asked.layout in IMAGES else asked.batch


def text(asked: Asked) -> torch.Tensor | None:
    """An embedding of the prompt: (batch, tokens, channels)."""
    names = ("encoder_hid_dim", "caption_channels", "text_embed_dim", "text_dim", "joint_attention_dim")
    width = asked.first(*names, "cap_feat_dim", "text_states_dim", "cross_attention_dim", "caption_projection_dim")
    return None if width is None else asked.noise(_rows(asked), _tokens(asked), width)


def mask(asked: Asked) -> torch.Tensor | None:
    """Which tokens of the prompt count. UNets' pipelines pass none."""
    is_unet = "down_block_types" in asked.config
    return None if is_unet else torch.ones(_rows(asked), _tokens(asked), dtype=torch.bool)


def row(*names: str) -> Callable[[Asked], torch.Tensor | None]:
    """One vector a sample, as wide as the first of ``names`` that the configuration has."""

    def build(asked: Asked) -> torch.Tensor | None:
        width = asked.first(*names)
        return None if width is None else asked.noise(_rows(asked), width)

    return build


def timestep(asked: Asked) -> torch.Tensor:
    return torch.full((_rows(asked),), 500.0)


def added_time_ids(asked: Asked) -> torch.Tensor | None:
    width, each = asked.first("projection_class_embeddings_input_dim"), asked.first("addition_time_embed_dim")
    return asked.noise(_rows(asked), width // each) if width and each else None


def added_conditions(asked: Asked) -> dict[str, Any] | None:
    """SDXL's pooled prompt and sizes; PixArt's sizes."""
    if asked.first("addition_embed_type") == "text_time":
        pooled = asked.config["projection_class_embeddings_input_dim"] - 6 * asked.config["addition_time_embed_dim"]
        return {"text_embeds": asked.noise(_rows(asked), pooled), "time_ids": asked.noise(_rows(asked), 6)}
    if "use_additional_conditions" not in asked.config:
        return None
    sized = asked.config["use_additional_conditions"]
    if sized or (sized is None and asked.first("sample_size") == 128):
        return {"resolution": asked.noise(_rows(asked), 2), "aspect_ratio": asked.noise(_rows(asked), 1)}
    return {"resolution": None, "aspect_ratio": None}


def class_labels(asked: Asked) -> torch.Tensor | None:
    classes = asked.first("num_class_embeds", "num_embeds_ada_norm")
    return torch.zeros(_rows(asked), dtype=torch.long) if classes else None


def guidance(asked: Asked) -> torch.Tensor | None:
    return torch.full((_rows(asked),), 6.0, dtype=asked.dtype) if asked.first("guidance_embeds") else None


def _ids(asked: Asked, tokens: int) -> torch.Tensor:
    """Places of tokens, a number for each axis that the positions turn about."""
    return torch.zeros(tokens, len(asked.config.get("axes_dims_rope") or (0, 0, 0)))


def image_shapes(asked: Asked) -> list[list[tuple[int, int, int]]]:
    return [[(1, asked.height // 2, asked.width // 2)]] * _rows(asked)


def rotary(asked: Asked) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Cosines and sines of positions: (tokens, width of a head)."""
    if not asked.first("use_rotary_positional_embeddings"):
        return None
    patch = asked.first("patch_size") or 1
    frames = -(-asked.frames // (asked.first("patch_size_t") or 1))
    tokens = frames * (asked.height // patch) * (asked.width // patch)
    return torch.ones(tokens, asked.config["attention_head_dim"]), torch.ones(
        tokens, asked.config["attention_head_dim"]
    )


def image_text(asked: Asked) -> torch.Tensor | None:
    """CLIP's embedding of a first frame."""
    width = asked.first("image_dim", "image_embed_dim")
    return None if width is None else asked.noise(asked.batch, 257, width)


def padding(asked: Asked) -> torch.Tensor | None:
    return (
        torch.zeros(1, 1, asked.height, asked.width, dtype=asked.dtype) if asked.first("concat_padding_mask") else None
    )


def two_numbers(asked: Asked) -> torch.Tensor:
    """A size or a place in pixels."""
    return torch.full((_rows(asked), 2), 8.0 * asked.height, dtype=asked.dtype)


BUILDERS: dict[str, Callable[[Asked], Any]] = {
    "sample": latent,
    "hidden_states": latent,
    "z": code,
    "h": code,
    "x": code,
    "image_latents": latent,
    "timestep": timestep,
    "timesteps": timestep,
    "encoder_hidden_states": text,
    "encoder_attention_mask": mask,
    "encoder_hidden_states_mask": mask,
    "pooled_projections": row("pooled_projection_dim"),
    "image_embeddings": row("cross_attention_dim"),
    "timestep_cond": row("time_cond_proj_dim"),
    "added_time_ids": added_time_ids,
    "added_cond_kwargs": added_conditions,
    "class_labels": class_labels,
    "guidance": guidance,
    "encoder_hidden_states_image": image_text,
    "image_rotary_emb": rotary,
    "img_ids": lambda asked: _ids(asked, (asked.height // 2) * (asked.width // 2)),
    "txt_ids": lambda asked: _ids(asked, _tokens(asked)),
    "img_shapes": image_shapes,
    "padding_mask": padding,
    "original_size": two_numbers,
    "target_size": two_numbers,
    "crop_coords": two_numbers,
    "fps": lambda asked: torch.full((asked.batch,), 16) if asked.first("cross_attention_dim") else None,
    "num_frames": lambda asked: asked.frames,
    "height": lambda asked: asked.height,
    "width": lambda asked: asked.width,
    "return_dict": lambda asked: False,
}
"""Argument -> its value, or None where this configuration has no use for it."""


def example_inputs(
    model: nn.Module, method: str, shape: Shape, dtype: torch.dtype, one_frame: bool = False
) -> tuple[Inputs, Shape]:
    """The arguments of ``model.method`` for a video of ``shape``, and the shape that they are for.

    ``one_frame`` lets an image model have a single one. Raises ``UsageError`` where arguments can't be derived.
    """
    name = f"{type(model).__name__}.{method}"
    parameters = list(inspect.signature(getattr(model, method)).parameters.values())
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    strange = [argument for argument in needed if argument not in BUILDERS]
    if strange:
        raise UsageError(f"{name} takes {', '.join(strange)}, which fxstream can't make up; {REMEDY}")
    names = [p.name for p in parameters if p.name in BUILDERS]
    furthest, problem = -1, "no layout of a latent suits its arguments"
    for layout in _layouts(names):
        size = replace(shape, frames=1) if one_frame and layout in IMAGES and "num_frames" not in names else shape
        asked = _asked(model, method, size, dtype, layout)
        values = {argument: BUILDERS[argument](asked) for argument in names}
        unknown = [argument for argument in needed if values[argument] is None]
        if unknown:
            raise UsageError(f"the configuration of {name} doesn't tell the size of {', '.join(unknown)}; {REMEDY}")
        kwargs = {argument: value for argument, value in values.items() if value is not None}
        operators, error = _tried(model, method, kwargs)
        if error is None:
            return ((), kwargs), size
        if operators > furthest:
            furthest, problem = operators, one_line(error)
    raise UsageError(f"no example inputs for {name} were found ({problem}); {REMEDY}")


def _layouts(names: Sequence[str]) -> Iterator[str]:
    """The layouts worth a try for a signature: a model that is told sizes or positions takes tokens."""
    packed = "img_ids" in names or "img_shapes" in names
    tokens = {"num_frames", "height", "width"} <= {*names}
    for layout in LAYOUTS:
        if (layout == PATCHES) == packed and (layout == TOKENS) == tokens:
            yield layout


def compression(model: nn.Module) -> tuple[int, int]:
    """The frames and the pixels that a step of the model's latent stands for."""
    return next((steps for part, steps in COMPRESSION.items() if part in type(model).__name__), (1, 8))


def _asked(model: Any, method: str, shape: Shape, dtype: torch.dtype, layout: str) -> Asked:
    frames, pixels = compression(model)
    if method == "decode":
        frames = getattr(model, "temporal_compression_ratio", frames)
        levels = model.config.get("block_out_channels")
        pixels = getattr(model, "spatial_compression_ratio", 2 ** (len(levels) - 1) if levels else pixels)
    latent_frames = (shape.frames - 1) // frames + 1
    return Asked(model.config, shape.batch, latent_frames, shape.height // pixels, shape.width // pixels, dtype, layout)


class _Count(TorchDispatchMode):
    """Counts the operators that ran."""

    operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        return function(*args, **(kwargs or {}))


def _tried(model: nn.Module, method: str, kwargs: dict[str, Any]) -> tuple[int, Exception | None]:
    """Runs the model on fake tensors: how many operators ran, and what stopped them.

    Operators whose result has a shape by the tensors' values stop only this: the capture has its own way with them.
    """
    weight = next(iter(model.parameters()), None)
    mode = weight.fake_mode if isinstance(weight, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)

    def fake(leaf: Any) -> Any:
        return mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) else leaf

    count, log = _Count(), logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells of errors that are raised anyway
    try:
        with torch.no_grad(), mode, count:
            getattr(model, method)(**tree_map(fake, kwargs))
    except (DynamicOutputShapeException, DataDependentOutputException):
        return count.operators, None
    except Exception as error:
        return count.operators, error
    finally:
        log.setLevel(level)
    return count.operators, None
