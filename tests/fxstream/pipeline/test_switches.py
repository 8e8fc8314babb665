"""Memory switches of components, turned off and on again."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from fxstream.pipeline.switches import turn_off


def chunk_sizes(module):
    return [(sub._chunk_size, sub._chunk_dim) for sub in module.modules() if isinstance(sub, BasicTransformerBlock)]


def test_forward_chunking():
    unet = UNet3DConditionModel(
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    unet.enable_forward_chunking(chunk_size=1, dim=1)
    before = chunk_sizes(unet)
    assert set(before) == {(1, 1)}
    names, turn_on = turn_off(unet)
    assert names == ["forward chunking"]
    assert {size for size, _ in chunk_sizes(unet)} == {None}
    turn_on()
    assert chunk_sizes(unet) == before


@pytest.mark.parametrize("switch", ["tiling", "slicing"])
def test_of_a_vae(switch):
    vae = AutoencoderKL(block_out_channels=(32,))
    getattr(vae, f"enable_{switch}")()
    names, turn_on = turn_off(vae)
    assert names == [switch]
    assert not vae.use_tiling and not vae.use_slicing
    turn_on()
    assert (vae.use_tiling, vae.use_slicing) == (switch == "tiling", switch == "slicing")


def test_nothing_to_turn_off():
    module = nn.Sequential(nn.Linear(2, 2))
    module.use_tiling = False
    names, turn_on = turn_off(module)
    turn_on()
    assert names == []
    assert module.use_tiling is False
    assert torch.is_tensor(module[0].weight)
