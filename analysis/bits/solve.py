"""A format for each part so that the divergence is least within given bytes, or the bytes least within a divergence.

Parts are independent: their divergences add up, which is near the truth as long as they are small. This is the
multiple-choice knapsack problem. It is solved by dynamic programming over bytes in units of a part in UNITS of the room
that there is, each choice rounded up, so that what is found always fits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moec.analysis.bits.parts import Choice

UNITS = 16384


def least_divergence(parts: Sequence[Sequence[Choice]], room: int) -> list[Choice] | None:
    """A choice for each part, together at most `room` bytes; None if even the smallest are more.

    Choices of a part are in order of bytes, the fewest first.
    """
    least = sum(choices[0].bytes for choices in parts)
    if least > room:
        return None
    unit = max(1, -(-(room - least) // UNITS))
    count = (room - least) // unit
    best = np.zeros(count + 1)
    taken = np.zeros((len(parts), count + 1), np.int16)
    for i, choices in enumerate(parts):
        new = np.full(count + 1, np.inf)
        for j, choice in enumerate(choices):
            cost = -(-(choice.bytes - choices[0].bytes) // unit)
            if cost > count:
                continue
            with_it = np.full(count + 1, np.inf)
            with_it[cost:] = best[: count + 1 - cost] + choice.kld
            better = with_it < new
            new[better], taken[i, better] = with_it[better], j
        best = new
    found: list[Choice] = []
    left = count
    for i in range(len(parts) - 1, -1, -1):
        choices = parts[i]
        choice = choices[taken[i, left]]
        left -= -(-(choice.bytes - choices[0].bytes) // unit)
        found.append(choice)
    return found[::-1]


def least_bytes(parts: Sequence[Sequence[Choice]], most_kld: float) -> list[Choice] | None:
    """A choice for each part whose divergences are together at most `most_kld`; None if even the best are more."""
    # the finest are taken as they are: in units of bytes, rounded up, not all of them may fit their own sum
    best = [min(choices, key=lambda c: (c.kld, c.bytes)) for choices in parts]
    if sum(c.kld for c in best) > most_kld:
        return None
    low, high = sum(c[0].bytes for c in parts), sum(c.bytes for c in best)
    step = max(1, (high - low) // UNITS)
    while high - low > step:
        middle = (low + high) // 2
        found = least_divergence(parts, middle)
        if found is not None and sum(c.kld for c in found) <= most_kld:
            best, high = found, middle
        else:
            low = middle
    return best
