import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxstream.pipeline.components import weight_bytes
from fxstream.tools import pipelines
from fxstream.tools.measure import measure_peak

GIB = 2**30

# Parameters of the published components, in millions.
PARAMETERS = {
    "svd": {"image_encoder": 632, "unet": 1525, "vae": 98},
    "animatediff": {"text_encoder": 123, "unet": 1313, "vae": 84},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_pipelines_build_without_memory(name):
    measured = measure_peak(pipelines.build, name)
    pipeline, call = measured.result
    assert type(pipeline).__name__ == pipelines.PIPELINES[name].class_path.split(":")[1]
    assert measured.peak_bytes < 2**20
    found = {part: getattr(pipeline, part) for part in PARAMETERS[name]}
    for part, millions in PARAMETERS[name].items():
        weights = list(found[part].parameters())
        assert all(isinstance(weight, FakeTensor) and weight.dtype is torch.float16 for weight in weights)
        assert sum(weight.numel() for weight in weights) / 1e6 == pytest.approx(millions, abs=1)
    assert set(weight_bytes(found)) == set(PARAMETERS[name])
    assert (call["height"], call["width"]) == (576, 1024)
    assert torch.get_default_dtype() is torch.float32


def test_its_modules_can_be_cast():
    pipeline, _ = pipelines.build("animatediff")
    before = weight_bytes({"vae": pipeline.vae})["vae"]
    pipeline.vae.to(torch.float32)
    assert weight_bytes({"vae": pipeline.vae})["vae"] == 2 * before


def test_unknown_name():
    with pytest.raises(KeyError, match="there are svd, svd-xt, animatediff"):
        pipelines.build("nope")
