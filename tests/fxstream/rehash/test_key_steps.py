"""Algorithm 1 of the paper, against the paper's own pseudocode."""

from __future__ import annotations

import pytest
import torch

from fxstream.rehash.key_steps import key_steps, most_alike


def as_published(similarity, gamma):
    i, j, found, steps = 0, 0, [0], len(similarity)
    while i < steps:
        if similarity[i][j] >= gamma:
            i += 1
        else:
            found.append(i)
            j = i
    found.append(steps - 1)
    return tuple(sorted(set(found)))


def random_map(seed, steps=12):
    features = torch.randn(steps, 6, generator=torch.Generator().manual_seed(seed)).cumsum(dim=0)
    unit = torch.nn.functional.normalize(features, dim=1)
    return (unit @ unit.T).clamp(max=1).fill_diagonal_(1.0).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_as_the_paper_has_it(seed):
    for gamma in (-1.0, 0.3, 0.8, 0.95, 1.0):
        assert key_steps(random_map(seed), gamma) == as_published(random_map(seed), gamma)


def test_alike_steps_are_skipped():
    alike = [[1.0] * 6] * 6
    assert key_steps(alike, 0.9) == (0, 5)
    apart = torch.eye(6).tolist()
    assert key_steps(apart, 0.9) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("full_steps", range(2, 13))
def test_the_highest_gamma_for_a_number_of_full_steps(full_steps):
    similarity = random_map(3)
    found = most_alike(similarity, full_steps)
    assert len(found) <= full_steps
    gammas = sorted({value for row in similarity for value in row})
    fitting = [gamma for gamma in gammas if len(key_steps(similarity, gamma)) <= full_steps]
    assert found == key_steps(similarity, max(fitting))


@pytest.mark.parametrize("full_steps", [1, 13])
def test_out_of_range(full_steps):
    with pytest.raises(ValueError, match=f"full_steps={full_steps} is out of range"):
        most_alike(random_map(0), full_steps)
