"""What a command works on: a name of the catalogue, a diffusers configuration, or a function that makes a model.

Weights are never read. Where the model runs for real they are random.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxstream.tools.errors import UsageError, one_line

if TYPE_CHECKING:
    import torch

    from fxstream.tools.catalogue import Entry, Shape

# Help and errors of usage come at once: what needs torch is imported by the command that runs, so the names of the
# catalogue stand here once more.
UNETS = ("svd-unet", "svd-xt-unet", "animatediff-unet", "modelscope-unet", "i2vgenxl-unet")
TRANSFORMERS = ("wan-transformer", "cogvideox-transformer", "ltx-transformer", "hunyuanvideo-transformer")
VAES = ("svd-vae", "sd-vae", "sd-vae-encode", "wan-vae", "cogvideox-vae", "ltx-vae", "hunyuanvideo-vae")
NAMES = (*UNETS, *TRANSFORMERS, *VAES)

FORMS = "a name of `fxstream models`, a diffusers folder or config.json, or package.module:function"

PIPELINE, MODEL = "model_index.json", "config.json"

SMALL = {"frames": 5, "height": 192, "width": 256, "batch": 2}
"""The size of a call to a small model, where none is given."""


@dataclass(frozen=True)
class Size:
    """What the options say of the call; None where they are silent. Height and width are pixels of the video.

    Silence on the device means a CUDA card, here or not, or where the call is to be run and there is none, the CPU.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int | None = None
    dtype: str | None = None
    device: str | None = None

    def given(self) -> dict[str, int]:
        """The sizes that were given."""
        sizes = {key: getattr(self, key) for key in ("frames", "height", "width", "batch")}
        return {key: value for key, value in sizes.items() if value is not None}

    def placed(self, fake: bool) -> Size:
        """The same with a device."""
        import torch

        return replace(self, device=self.device or ("cuda" if fake or torch.cuda.is_available() else "cpu"))

    def replaced(self, sizes: Mapping[str, int]) -> Size:
        """The same with other frames, height or width."""
        return replace(self, **{**self.given(), **sizes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Steps:
    """The least by which a model's frames and pixels can be changed: frames are one and a multiple of theirs."""

    frames: int = 1
    pixels: int = 64


@dataclass(frozen=True)
class Target:
    """A call to inspect: ``call(*args, **kwargs)``, a module or a bound method of one.

    ``shape`` is the size of the video; None where a user's function made the inputs.
    """

    name: str
    model: torch.nn.Module
    call: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    shape: Shape | None = None
    steps: Steps = field(default_factory=Steps)

    @property
    def kind(self) -> str:
        """The model's class, and the method if it isn't ``forward``."""
        name = type(self.model).__name__
        return name if self.call is self.model else f"{name}.{self.call.__name__}"

    @property
    def device(self) -> str:
        """The kind of device that it stands on."""
        from fxstream.passes.graph.call import Inputs

        tensors = [*self.model.parameters(), *Inputs.of(self.args, self.kwargs).tensors]
        return max(tensors, key=lambda tensor: tensor.nbytes).device.type if tensors else "cpu"

    def inputs(self) -> list[str]:
        """The tensors of the call, as ``"sample 2x14x8x72x128 float16"``."""
        import torch
        from torch.utils._pytree import keystr, tree_leaves_with_path

        names = inspect.signature(self.model.forward if self.call is self.model else self.call).parameters
        given = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        found = []
        for name, value in given.items():
            for path, leaf in tree_leaves_with_path(value):
                if isinstance(leaf, torch.Tensor):
                    size = "x".join(map(str, leaf.shape)) or "scalar"
                    found.append(f"{name}{keystr(path)} {size} {str(leaf.dtype).removeprefix('torch.')}")
        return found


def check(target: str) -> None:
    """Raises ``UsageError`` for what can't be a target, without loading torch."""
    if target in NAMES or ":" in target or Path(target).exists():
        return
    if os.sep in target or target.endswith(".json"):
        raise UsageError(f"there is no file or folder {target}; TARGET is {FORMS}")
    near = get_close_matches(target, NAMES, n=1)
    known = f"did you mean {near[0]}?" if near else f"the names are {', '.join(NAMES)}"
    raise UsageError(f"there is no model {target!r} in the catalogue, and no such file or folder; {known}")


def load(target: str, size: Size, *, component: str | None = None, small: bool = False, fake: bool = True) -> Target:
    """The target at a size; with ``fake`` its weights and inputs take no memory, else they are random.

    Raises ``UsageError`` for one that can't be made.
    """
    check(target)
    if not is_function(target):
        size = size.placed(fake)
        _check_device(str(size.device), fake)
    if component is not None and not _is_pipeline(Path(target)):
        raise UsageError(f"--component is for a pipeline's folder, with a {PIPELINE}; {target} is none")
    if target in NAMES:
        return _named(target, size, small, fake)
    if small:
        raise UsageError(f"--small is for models of the catalogue; {target} is none")
    if Path(target).exists():
        return _configured(Path(target), size, component, fake)
    return _made(target, size)


def is_function(target: str) -> bool:
    """Whether a target names a user's function, which makes the model where it likes."""
    return ":" in target and not Path(target).exists()


def _is_pipeline(path: Path) -> bool:
    return path.name == PIPELINE or (path / PIPELINE).is_file()


def _check_device(device: str, fake: bool) -> None:
    """Fake tensors need no device, but a torch that was built for it."""
    import torch

    from fxstream.tools.catalogue import building

    try:
        with building(device, fake):
            torch.empty(1).uniform_()
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} can't be used here ({one_line(error)}); try --device cpu") from None


def _named(name: str, size: Size, small: bool, fake: bool) -> Target:

    from fxstream.tools import catalogue

    entry = catalogue.CATALOGUE[name]
    dtype = _dtype(size.dtype or ("float32" if small else "float16"))
    shape = entry.shape.resized(**{**(SMALL if small else {}), **size.given()})
    sizes = {"frames": shape.frames, "height": shape.height, "width": shape.width, "batch": shape.batch}
    assert size.device is not None
    if small and not fake:
        latent = dict(zip(("height", "width"), shape.latent, strict=True))
        made = catalogue.small(name, dtype=dtype, **{**sizes, **latent}, device=size.device)
    else:
        built = replace(entry, config={**entry.config, **entry.small}) if small else entry
        made = catalogue.build(built, **sizes, dtype=dtype, device=size.device, fake=fake)
    call, args, kwargs = made
    model: Any = call
    model = getattr(model, "__self__", model)
    return Target(name, model, call, args, kwargs, shape, _steps(model, call is model))


def _method(model: torch.nn.Module, name: str) -> Callable[..., Any]:
    return model if name == "forward" else getattr(model, name)


def _configured(path: Path, size: Size, component: str | None, fake: bool) -> Target:
    """A model by its configuration: a file, its folder, or a component of a pipeline's folder."""
    from fxstream.fake import default_dtype
    from fxstream.tools.catalogue import CATALOGUE, building, placed

    file = _configuration_file(path, component)
    config = _read(file)
    kind = _class(config, file)
    dtype = _dtype(size.dtype or "float16")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    assert size.device is not None
    with building(size.device, fake):
        try:
            with default_dtype(dtype):
                model = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
        except Exception as error:
            raise UsageError(
                f"{kind.__name__} can't be built from {file} ({one_line(error)}); check its values"
            ) from error
        placed(model.eval().requires_grad_(False))
        entry = next((e for e in CATALOGUE.values() if e.class_path.endswith(f":{kind.__name__}")), None)
        method = _inspected_method(model, entry)
        shape = (entry.shape if entry else _shape(model.config, method)).resized(**size.given())
        if entry is not None and method == "forward":  # an autoencoder's latent depends on its levels
            args, kwargs = entry.inputs(model.config, shape, dtype)
        else:
            from fxstream.tools.inputs import example_inputs

            (args, kwargs), shape = example_inputs(model, method, shape, dtype, one_frame=size.frames is None)
    name = file.parent.name if file.name == MODEL else file.stem
    call = _method(model, method)
    return Target(name or kind.__name__, model, call, args, kwargs, shape, _steps(model, call is model))


def _inspected_method(model: torch.nn.Module, entry: Entry | None) -> str:
    """Of an autoencoder, decoding: that is what needs the memory."""
    if entry is not None:
        return entry.method
    return "decode" if hasattr(model, "decode") and hasattr(model, "encode") else "forward"


def _configuration_file(path: Path, component: str | None) -> Path:
    if path.is_file() and not _is_pipeline(path):
        return path
    path = path.parent if path.is_file() else path
    if _is_pipeline(path):
        listed = _read(path / PIPELINE)
        known = [key for key, value in listed.items() if isinstance(value, list) and (path / key / MODEL).is_file()]
        known = [key for key in known if listed[key][0] == "diffusers" and "_class_name" in _read(path / key / MODEL)]
        if not known:
            raise UsageError(
                f"the pipeline {path} has no folder with the {MODEL} of a diffusers model; pass such a folder"
            )
        if component is None:
            raise UsageError(f"{path} is a pipeline: say which model with --component {' or '.join(known)}")
        if component not in known:
            raise UsageError(
                f"the pipeline {path} has no model {component!r}; --component is one of {', '.join(known)}"
            )
        return path / component / MODEL
    if not (path / MODEL).is_file():
        raise UsageError(f"the folder {path} has neither a {MODEL} (a model) nor a {PIPELINE} (a pipeline)")
    return path / MODEL


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is no text; a diffusers configuration is JSON") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{file} is no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} is no diffusers configuration: it holds a {type(found).__name__}, not an object")
    return found


def _class(config: dict[str, Any], file: Path) -> Any:
    import diffusers
    import torch

    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UsageError(f"{file} is no configuration of a diffusers model: it has no _class_name")
    kind = getattr(diffusers, name, None)
    if not inspect.isclass(kind):
        raise UsageError(
            f"diffusers {diffusers.__version__} has no class {name}, which {file} names; use a version that has, or "
            "pass a function that makes the model as package.module:function"
        )
    if not issubclass(kind, torch.nn.Module) and not hasattr(kind, "_backends"):
        raise UsageError(f"{file} configures {name}, which is no model; pass the file of a UNet, transformer or VAE")
    return kind


def _shape(config: Mapping[str, Any], method: str) -> Shape:
    """The size of a video that a configuration speaks of, or one that is usual."""
    from fxstream.tools.catalogue import Shape

    side = config.get("sample_size")
    height, width = side if isinstance(side, (list, tuple)) and len(side) == 2 else (side, side)
    height, width = config.get("sample_height") or height, config.get("sample_width") or width
    rows, columns = (8 * value if isinstance(value, int) and method == "forward" else 512 for value in (height, width))
    frames = config.get("num_frames") or config.get("sample_frames") or 16
    return Shape(frames, rows, columns, batch=1 if method == "decode" else 2)


def _steps(model: Any, is_forward: bool) -> Steps:
    """A UNet halves its latent at each level but the last, a transformer cuts it into patches."""
    from fxstream.tools.inputs import compression

    frames, pixels = compression(model)
    if not is_forward:  # an autoencoder
        return Steps(frames, pixels)
    levels, patch = model.config.get("block_out_channels"), model.config.get("patch_size")
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    return Steps(frames, pixels * (2 ** (len(levels) - 1) if levels else patch or 1))


def _made(target: str, size: Size) -> Target:
    """A user's function, called with those of the options that were given."""
    import torch

    function = _function(target)
    options: dict[str, Any] = size.given()
    if size.dtype is not None:
        options["dtype"] = _dtype(size.dtype)
    if size.device is not None:
        options["device"] = size.device
    taken = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        refused = [f"--{option}" for option in options if option not in taken]
        if refused:
            raise UsageError(
                f"{target} takes no argument for {', '.join(refused)}; give it one of that name, or leave it"
            )
    try:
        made = function(**options)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{target} raised {one_line(error)}; mend it (--debug shows where)") from error
    wanted = "(model, args, kwargs): a torch.nn.Module or a bound method of one, a tuple, and a dict"
    if not isinstance(made, tuple) or len(made) != 3:
        raise UsageError(f"{target} returned a {type(made).__name__}, not {wanted}")
    call, args, kwargs = made
    model = call if isinstance(call, torch.nn.Module) else getattr(call, "__self__", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        kinds = ", ".join(type(value).__name__ for value in made)
        raise UsageError(f"{target} returned ({kinds}), not {wanted}")
    return Target(target.rpartition(":")[2], model, call, args, kwargs, None)


def _function(target: str) -> Callable[..., Any]:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise UsageError(f"{target!r} is not of the form package.module:function")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UsageError(f"{module_name} can't be imported ({one_line(error)}); install what it needs") from error
        raise UsageError(f"there is no module {error.name}; run where it can be imported, or set PYTHONPATH") from None
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{module_name} raised {one_line(error)} when imported; mend it (--debug shows where)"
        ) from error
    finally:
        sys.path.pop(0)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        what = "nothing" if found is None else f"a {type(found).__name__}, not a function,"
        raise UsageError(f"{module_name} has {what} called {name}; name a function that returns (model, args, kwargs)")
    return found


def _dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found
