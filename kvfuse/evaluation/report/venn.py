"""Where the circles of two or three sets go, and the counts in them."""

from collections.abc import Sequence
from math import acos, pi, sqrt
from typing import NamedTuple

import numpy as np


class Circle(NamedTuple):
    """A circle by its centre."""

    x: float
    y: float
    radius: float


THREE = (Circle(-0.6, 0.45, 1.0), Circle(0.6, 0.45, 1.0), Circle(0.0, -0.55, 1.0))
"""Three alike ones, of which all regions show; three circles to scale need not exist."""
LARGEST = 1.2


def two_circles(first: float, both: float, second: float) -> list[Circle]:
    """Two circles whose areas, and that which they share, are proportional to counts; centred on zero.

    Args:
        first: Items of the first set alone.
        both: Items of both.
        second: Items of the second alone.
    """
    from scipy.optimize import brentq

    whole = max(first, second) + both or 1.0
    one, other = (LARGEST * sqrt((alone + both) / whole) for alone in (first, second))
    inside, apart = abs(one - other), one + other
    if not both or not min(first, second):
        distance = inside if both else apart
    else:
        distance = brentq(lambda between: lens(between, one, other) - pi * LARGEST**2 * both / whole, inside, apart)
    middle = (min(-one, distance - other) + max(one, distance + other)) / 2
    return [Circle(-middle, 0.0, one), Circle(distance - middle, 0.0, other)]


def lens(distance: float, one: float, other: float) -> float:
    """Area that two circles of these radii share, their centres so far apart."""
    if distance >= one + other:
        return 0.0
    if distance <= abs(one - other):
        return pi * min(one, other) ** 2
    angle = acos((distance**2 + one**2 - other**2) / (2 * distance * one))
    beside = acos((distance**2 + other**2 - one**2) / (2 * distance * other))
    kite = sqrt(
        (one + other - distance) * (distance + one - other) * (distance - one + other) * (distance + one + other)
    )
    return one**2 * angle + other**2 * beside - kite / 2


def middle(circles: Sequence[Circle], inside: Sequence[bool]) -> tuple[float, float, float]:
    """The place of a region that is farthest from every line, and how far that is; below zero: there is no such region.

    Args:
        circles: All of them.
        inside: Whether the region is inside of each.
    """
    grid = np.stack(np.meshgrid(np.linspace(-2.5, 2.5, 101), np.linspace(-1.6, 1.6, 65)), axis=-1).reshape(-1, 2)
    depths = np.array([one.radius - np.hypot(grid[:, 0] - one.x, grid[:, 1] - one.y) for one in circles])
    room = np.where(np.array(inside)[:, None], depths, -depths).min(axis=0)
    best = grid[room >= room.max() - 0.02]
    x, y = best[np.abs(best[:, 1]).argmin()]
    return float(x), float(y), float(room.max())
