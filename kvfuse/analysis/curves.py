"""The picture of what was measured against something: right answers on the left, how unlikely they seem on the right."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from kvfuse.support.plots import COLOURS, INK, MARKERS, legend_above, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = tuple[Sequence[float], Sequence[Mapping[str, Any]]]
"""Places on the horizontal axis, and what was measured at each (:meth:`kvfuse.analysis.answering.Answered.to_dict`)."""
LOOKS = tuple(zip(COLOURS, MARKERS, strict=True))
MEASURES = (
    ("accuracy", "interval", 100, "right answers (%), 95% interval"),
    ("bits_per_character", "bits_interval", 1, "bits per character of right answers"),
)


@styled
def curves(
    axis: str, series: Mapping[str, Series], levels: Mapping[str, Mapping[str, Any]] | None = None, joined: bool = True
) -> "Figure":
    """Draw both measures with their 95% intervals.

    Args:
        axis: What the horizontal axis is, with its unit.
        series: By name.
        levels: By name what was measured once, as a horizontal line.
        joined: Whether places are numbers with something between them, and lines join them.
    """
    figure, panels = new_panels(4.2, 2)
    shown: list[Any] = []
    for axes, (measure, spread, scale, label) in zip(panels, MEASURES, strict=True):
        shown = [
            _points(axes, one, measure, spread, scale, name, look, joined)
            for (name, one), look in zip(series.items(), LOOKS, strict=False)
        ]
        for (name, one), dashes in zip((levels or {}).items(), cycle(((4, 3), (1, 2))), strict=False):
            shown.append(
                axes.axhline(scale * one[measure], color=INK, linewidth=1.2, linestyle=(0, dashes), label=name)
            )
        axes.set(xlabel=axis, ylabel=label)
        axes.set_ylim(0, 102 if scale == 100 else None)
        axes.margins(x=0.08)
        axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.6)
    legend_above(figure, shown)
    return figure


def _points(
    axes: Any, one: Series, measure: str, spread: str, scale: float, name: str, look: tuple[str, str], joined: bool
) -> Any:
    (places, measured), (colour, marker) = one, look
    middle = [scale * figures[measure] for figures in measured]
    low, high = ([scale * figures[spread][side] for figures in measured] for side in (0, 1))
    around = [
        [m - one for m, one in zip(middle, low, strict=True)],
        [one - m for m, one in zip(middle, high, strict=True)],
    ]
    line = f"-{marker}" if joined and len(middle) > 1 else marker
    return axes.errorbar(
        places, middle, around, fmt=line, color=colour, label=name, markersize=6, elinewidth=1, capsize=2
    )
