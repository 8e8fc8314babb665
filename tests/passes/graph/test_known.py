"""Known values: shapes and numbers made of a small input's values, in captures and in plans for each of these."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import Lumina2Transformer2DModel, MochiTransformer3DModel
from torch import nn
from torch.utils import _pytree as pytree

import fxstream
from fxstream import CaptureError
from fxstream.passes.graph.capture import capture
from fxstream.passes.graph.known import MOST
from fxstream.tools.bench import relative_l2
from fxstream.tools.measure import measure_peak

MASK = torch.tensor([[1, 1, 0, 0, 1], [1, 1, 1, 0, 0]]).bool()


class Function(nn.Module):
    """A function of hidden states (2, 5, 8), a mask (2, 5), and a linear layer that makes the first unknown."""

    def __init__(self, function):
        super().__init__()
        self.function, self.layer = function, nn.Linear(8, 8)

    def forward(self, x, mask):
        return self.function(self.layer(x), mask)


def edited(x, mask):
    mask[:, 0] = False
    mask |= torch.arange(5) == 4
    return x[mask]


def counted(x, mask):
    lengths = mask.sum(1)
    starts = torch.zeros(3, dtype=torch.int64)
    starts[1:] = lengths.cumsum(0)
    return [x.flatten(0, 1)[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)]


def scattered(x, mask):
    packed = x[mask] * 2
    out = torch.zeros_like(x)
    out[mask] = packed
    return out


ASKED = {
    "a mask as an index": lambda x, mask: x[mask],
    "a mask among other indices": lambda x, mask: x[:, mask[0]],
    "positions of a mask": lambda x, mask: x.flatten(0, 1)[torch.nonzero(mask.flatten()).flatten()],
    "positions of a mask by dimension": lambda x, mask: x[mask.nonzero(as_tuple=True)],
    "lengths": lambda x, mask: [row[:length] for row, length in zip(x, mask.sum(1).tolist(), strict=True)],
    "a count": lambda x, mask: x[:, : int(mask.sum(1).max())],
    "a bound": lambda x, mask: x[:, : mask.sum(1)[0]],
    "a branch": lambda x, mask: x * 2 if mask.all() else x[mask] * 3,
    "a number": lambda x, mask: x / mask.sum().item(),
    "repeats": lambda x, mask: x[0].repeat_interleave(mask[0].long() + 1, dim=0),
    "repeats of all": lambda x, mask: torch.repeat_interleave(x[:, 0, 0], mask.sum(1)),
    "a list of lengths": lambda x, mask: [row[: int(length)] for row, length in zip(x, mask.sum(1), strict=True)],
    "whether it is there": lambda x, mask: x[1:] if 2 in mask.sum(1) else x[:1],
    "an array": lambda x, mask: x[:, : mask.sum(1).numpy().max()],
    "kinds": lambda x, mask: x[: len(torch.unique(mask.sum(1)))],
    "bounds that are counted": counted,
    "a mask that is edited": edited,
    "what a mask picked, put back": scattered,
    "none at all": lambda x, mask: x[mask & ~mask],
}


@pytest.mark.parametrize("name", ASKED)
def test_shapes_of_values(name):
    model = Function(ASKED[name]).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    given = MASK.clone()
    captured = capture(model, (x, given))
    assert torch.equal(given, MASK)
    assert captured.read == (1,)
    result = captured.result(captured.graph_module(x, MASK.clone()))
    for found, expected in zip(*map(pytree.tree_leaves, (result, model(x, MASK.clone()))), strict=True):
        assert found.shape == expected.shape and torch.allclose(found, expected)


def unseen(x, mask):
    mask.copy_((x[..., 0] > 0) | mask)
    return x[mask]


def drawn(x, mask):
    return x[torch.rand_like(mask.float()) > 0.5]


UNKNOWN = {
    "of values that are computed": lambda x, mask: x[x[..., 0] > 0],
    "of a mask that was written over": unseen,
    "of random numbers": drawn,
    "of a sum of unknown numbers": lambda x, mask: x[: int(x.sum()), mask[0]],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_shapes_of_what_is_not_known_are_refused(name):
    model = Function(UNKNOWN[name]).eval().requires_grad_(False)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match="depend"):
        capture(model, (torch.randn(2, 5, 8), MASK.clone()))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_large_and_fractional_inputs_are_not_followed():
    class Cut(nn.Module):
        def forward(self, x, lengths):
            return x[: int(lengths.max())]

    x, most = torch.randn(9, 4), MOST // 8
    assert capture(Cut(), (x, torch.full((most,), 3))).read == (1,)
    for lengths in (torch.full((most + 1,), 3), torch.full((2, 2), 3.0), torch.ones(2)):
        with pytest.raises(CaptureError):
            capture(Cut(), (x, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_type_are_followed(dtype):
    """As pipelines pass them: in the type of the hidden states."""
    model = Function(lambda x, mask: x[:, : int(mask.sum(1).max())]).eval().requires_grad_(False)
    streamed = fxstream.optimize(model, "min", fullgraph=True)
    x = torch.randn(2, 5, 8)
    for mask in (MASK, MASK[:, :3], ~MASK):
        assert torch.allclose(streamed(x, mask.to(dtype)), model(x, mask.to(dtype)), atol=1e-6)
    assert len(streamed.plans) == 3
    with pytest.raises(CaptureError):
        streamed(x, MASK.to(dtype) / 2)


def test_inputs_are_followed_in_their_own_layout():
    """Where a mask lies in memory once for all rows, a contiguous copy of it is another tensor."""

    def written(x, mask):
        copy = mask.contiguous()
        copy[0, 0] = False
        return x[copy], x[mask]

    model, x = Function(written).eval().requires_grad_(False), torch.randn(2, 5, 8)
    mask = MASK[0].expand(2, 5)
    captured = capture(model, (x, mask))
    result = captured.graph_module(x, mask)
    assert [len(found) for found in result] == [5, 6]
    assert all(torch.equal(a, b) for a, b in zip(result, model(x, mask), strict=True))


def test_what_is_not_asked_costs_no_plan():
    model = Function(lambda x, mask: x * mask[..., None]).eval().requires_grad_(False)
    streamed = fxstream.optimize(model, "min")
    x = torch.randn(2, 5, 8)
    for mask in (MASK, ~MASK):
        assert torch.allclose(streamed(x, mask), model(x, mask), atol=1e-6)
    assert len(streamed.plans) == 1


def test_one_value_for_all_that_a_mask_picks_is_not_asked():
    def filled(x, mask):
        x = x.clone()
        x[mask] = torch.ones(8)
        return x

    model = Function(filled).eval().requires_grad_(False)
    assert capture(model, (torch.randn(2, 5, 8), MASK)).read == ()


def test_each_value_has_a_plan_of_its_own():
    model = Function(lambda x, mask: x[mask]).eval().requires_grad_(False)
    streamed = fxstream.optimize(model, "min")
    x = torch.randn(2, 5, 8)
    masks = [torch.arange(10).view(2, 5) < count for count in range(1, 7)]
    for mask in [*masks[:4], *masks[:4]]:
        assert torch.allclose(streamed(x, mask), model(x, mask), atol=1e-6)
    assert len(streamed.plans) == 4
    with pytest.warns(UserWarning, match="differ in a tensor's values alone"):
        streamed(x, masks[4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(streamed(x, masks[5]), model(x, masks[5]), atol=1e-6)


def mochi():
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    mask = torch.arange(16) < torch.tensor([[5], [9]])
    return model, (torch.randn(2, 4, 3, 16, 16), torch.randn(2, 16, 16), torch.tensor([500, 500]), mask)


def lumina():
    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32),
        cap_feat_dim=8,
    )
    mask = torch.arange(16) < torch.tensor([[9], [16]])
    return model, (torch.randn(2, 4, 32, 32), torch.rand(2), torch.randn(2, 16, 8), mask)


@pytest.mark.parametrize("made", [mochi, lumina])
def test_transformers_that_drop_padded_tokens(made):
    model, args = made()
    model.eval().requires_grad_(False)
    streamed = fxstream.optimize(model, "min", args, {"return_dict": False})
    [plan] = streamed.plans
    assert plan.after.peak_bytes < 0.65 * plan.before.peak_bytes
    with torch.no_grad():
        measured = measure_peak(streamed, *args, return_dict=False)
        assert relative_l2(measured.result[0], model(*args, return_dict=False)[0]) <= 1e-6
    assert measured.peak_bytes == pytest.approx(plan.after.peak_bytes, rel=0.01)
