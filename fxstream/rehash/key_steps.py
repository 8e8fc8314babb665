"""Which steps of a generation are computed in full."""

from __future__ import annotations

from collections.abc import Sequence


def key_steps(similarity: Sequence[Sequence[float]], gamma: float) -> tuple[int, ...]:
    """The paper's Algorithm 1: the full steps of a generation, given a K x K map of how alike its steps are.

    A step is skipped while it is alike the last full one by at least ``gamma``; the first and the last are full.
    """
    last = len(similarity) - 1
    keys = [0]
    for step in range(1, last):
        if similarity[step][keys[-1]] < gamma:
            keys.append(step)
    return tuple(dict.fromkeys([*keys, last]))


def most_alike(similarity: Sequence[Sequence[float]], full_steps: int) -> tuple[int, ...]:
    """The key steps of Algorithm 1 at the highest gamma that takes at most ``full_steps``.

    Raises ``ValueError`` for less than the first and the last step, or more than there are.
    """
    if not 2 <= full_steps <= len(similarity):
        raise ValueError(
            f"full_steps={full_steps} is out of range: of {len(similarity)} steps at least the first and the last are "
            "computed in full"
        )
    # The number of key steps does not always rise with gamma, so each gamma at which something changes is tried.
    gammas = sorted({value for row in similarity for value in row}, reverse=True)
    found = (key_steps(similarity, gamma) for gamma in [*gammas, -1.0])
    return next(keys for keys in found if len(keys) <= full_steps)
