"""The data set, and the numbers that tell its clips from others."""

from __future__ import annotations

import pytest
import torch

from fxstream.tools import quality
from fxstream.tools.generation import generate, label_embedding, label_of, load, noise_schedule, pack, unpack
from fxstream.tools.shapes import COLOURS, FRAMES, GROUND, MOTIONS, SHAPES, SIZE, draw


@pytest.fixture(scope="module")
def clips():
    return draw(200, torch.Generator().manual_seed(0))


def test_clips_are_what_their_labels_say(clips):
    assert clips.video.shape == (200, FRAMES, 3, SIZE, SIZE)
    assert clips.video.abs().max() <= 1
    found = quality.measure(clips.video)
    bounce, slide = (found.motion[clips.motion == MOTIONS.index(name)] for name in ("bounce", "slide"))
    assert bounce.min() > slide.max()
    brightest = clips.video.flatten(3).mean(dim=(1, 3))
    expected = (COLOURS[clips.colour] - GROUND).argmax(dim=1)
    assert torch.equal(brightest.gather(1, expected[:, None])[:, 0], brightest.amax(dim=1))


def test_the_same_seed_the_same_clips(clips):
    assert torch.equal(draw(200, torch.Generator().manual_seed(0)).video, clips.video)


def test_real_clips_pass(clips):
    assert quality.measure(clips.video).passed()["all"].float().mean() >= 0.99


def test_others_fail(clips):
    """Noise, a still, nothing at all, frames of different clips, and a clip whose shape changes its colour."""
    generator = torch.Generator().manual_seed(1)
    video = clips.video
    others = {
        "noise": torch.randn(video.shape, generator=generator).clamp(-1, 1),
        "still": video[:, :1].expand_as(video),
        "nothing": torch.full_like(video, GROUND),
        "mixed": torch.stack([video[(torch.arange(FRAMES) * 17 + n) % 200, torch.arange(FRAMES)] for n in range(200)]),
        "recoloured": torch.cat([video[:, :4], video[:, 4:].roll(1, dims=2)], dim=1),
    }
    for name, other in others.items():
        assert quality.measure(other).passed()["all"].float().mean() <= 0.1, name


def test_packing_loses_nothing(clips):
    packed = pack(clips.video[:2])
    assert packed.shape == (2, 12, FRAMES, SIZE // 2, SIZE // 2)
    assert torch.equal(unpack(packed), clips.video[:2])


def test_labels_differ_and_may_be_dropped():
    labels = torch.tensor([label_of(seed) for seed in range(len(SHAPES) * len(MOTIONS))])
    kept = torch.arange(len(labels)) > 0
    found = label_embedding(*labels.T, kept)[::FRAMES, 0]
    assert len({tuple(row.tolist()) for row in found}) == len(labels)
    assert found[0].count_nonzero() == 1


def test_a_clip_follows_from_its_seed():
    """Alone or among others; a model that says nothing leaves noise, which fails."""

    def silent(sample, timestep, label, return_dict):
        return (torch.zeros_like(sample),)

    made = generate(silent, [3, 4], steps=3)
    assert torch.equal(made[1:], generate(silent, [4], steps=3))
    assert not quality.measure(made).passed()["all"].any()


def test_a_clip_keeps_the_noise_that_it_began_with():
    """Where the clean clip that the model sees lies beyond what pixels hold, as guidance makes it."""
    noises, alphas = [], noise_schedule().alphas_cumprod

    def beyond(sample, timestep, label, return_dict):
        clean, noise = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
        noises.append((sample - clean) / noise)
        return ((clean * sample - 1.5) / noise,)

    generate(beyond, [3], steps=5)
    assert all(torch.allclose(noise, noises[0], atol=1e-4) for noise in noises)


def test_the_demos_model_makes_clips_like_these():
    """Shapes of one colour that move as they should, most of them with as clean an edge as real ones."""
    passed = quality.measure(generate(load(), range(12))).passed()
    assert passed["area"].all() and passed["steady area"].all()
    assert passed["motion"].sum() >= 10 and passed["all"].sum() >= 9
