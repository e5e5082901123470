"""Curves with 95% intervals, and the picture that analyses share: accuracy left, bits per character right."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from kvfuse.support.plots import DASHED, INK, LOOKS, Axes, Figure, legend_above, new_panels, styled

Point = tuple[float, float, Sequence[float]]
"""Position on the horizontal axis, value, and both ends of its interval."""
Series = tuple[Sequence[float], Sequence[Mapping[str, Any]]]
"""Positions on the horizontal axis, and the figures measured at each (``Answered.to_dict``)."""
MEASURES = (
    ("accuracy", "interval", 100, "right answers (%), 95% interval"),
    ("bits_per_character", "bits_interval", 1, "bits per character of right answers"),
)
"""Key of a figure, key of its interval, scale, and label of the axis."""
LEVEL_DASHES = (DASHED, (0, (1, 2)))


@styled
def curves(
    axis: str, series: Mapping[str, Series], levels: Mapping[str, Mapping[str, Any]] | None = None, joined: bool = True
) -> Figure:
    """Draw accuracy and bits per character with their 95% intervals.

    Args:
        axis: Label of the horizontal axis, with its unit.
        series: Measured figures by name.
        levels: References by name, measured once and drawn as horizontal lines.
        joined: Join neighbouring points by lines; False where nothing lies between them, as for layers.
    """
    figure, panels = new_panels(4.2, 2)
    handles: list[Any] = []
    for axes, (measure, interval, scale, label) in zip(panels, MEASURES, strict=True):
        # scale values and both ends of their intervals
        points = {
            name: [
                (x, scale * found[measure], [scale * end for end in found[interval]])
                for x, found in zip(positions, measured, strict=True)
            ]
            for name, (positions, measured) in series.items()
        }
        handles = list(draw_curves(axes, points, joined=joined).values())
        # references have no interval
        for (name, found), dashes in zip((levels or {}).items(), cycle(LEVEL_DASHES), strict=False):
            handles.append(axes.axhline(scale * found[measure], color=INK, linewidth=1.2, linestyle=dashes, label=name))
        axes.set(xlabel=axis, ylabel=label)
        axes.set_ylim(0, 102 if scale == 100 else None)
    legend_above(figure, handles)
    return figure


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Point]],
    looks: Mapping[str, tuple[str, str]] | None = None,
    joined: bool = True,
) -> dict[str, Any]:
    """Draw values with error bars; returns a legend handle per name.

    Args:
        axes: Where to draw.
        curves: Points by name.
        looks: Colour and marker by name; by default in the order of :data:`kvfuse.support.plots.LOOKS`.
        joined: See :func:`curves`.
    """
    looks, handles = looks or dict(zip(curves, LOOKS, strict=False)), {}
    for name, points in curves.items():
        colour, marker = looks[name]
        x, values, intervals = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        low, high = intervals.T
        line = f"-{marker}" if joined and len(x) > 1 else marker
        # matplotlib wants distances from the value, down and up
        errors = [values - low, high - values]
        handles[name] = axes.errorbar(x, values, errors, fmt=line, color=colour, elinewidth=1, label=name)
    axes.margins(x=0.08)
    axes.grid(axis="y")
    return handles
