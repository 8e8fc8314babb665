import pytest
import torch
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel

import fxstream


def test_a_cache_of_diffusers_is_refused_by_name():
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
    )
    model.eval().requires_grad_(False).enable_cache(FirstBlockCacheConfig(threshold=0.1))
    inputs = torch.randn(1, 4, 1, 4, 4), torch.tensor([5]), torch.randn(1, 3, 8)
    with pytest.raises(
        fxstream.CaptureError, match=r"FBCHeadBlockHook.*(?s:.*)disable_cache\(\).*StepRehash"
    ) as raised:
        fxstream.optimize(model, "min", inputs)
    assert raised.value.module_path == "blocks.0"
    model.disable_cache()
    assert fxstream.optimize(model, "min", inputs).plans
