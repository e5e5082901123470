"""Figures of a report: intervals, circles, categories, time by phase."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from kvfuse.evaluation.report.venn import THREE, Circle, middle, two_circles
from kvfuse.support.plots import COLOURS, INK, MARKERS, PAPER, WIDTH, legend_above, name_lines, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvfuse.evaluation.scoring.statistics import Interval

NAME_PLACES = (-1, 0.0), (1, 0.0), (1, 0.5)
"""Of a circle's name: its side, and how far below the middle."""

Estimate = tuple[str, float, "Interval"]
"""A label, a share and its interval."""


@styled
def forest(estimates: Sequence[Estimate], axis: str, zero: bool = False) -> "Figure":
    """Points with their intervals, one a line, from above.

    Args:
        estimates: What to draw; shares are shown as percent.
        axis: What the horizontal axis is, with its unit.
        zero: Draw a line at zero, and what is on neither side of it hollow.
    """
    figure, axes = new_axes(0.9 + 0.3 * len(estimates))
    for i, (_, share, (low, high)) in enumerate(estimates):
        told = not zero or low > 0 or high < 0
        axes.plot([100 * low, 100 * high], [i, i], color=COLOURS[0], linewidth=2, solid_capstyle="butt")
        axes.plot(100 * share, i, "o", color=COLOURS[0], markersize=7, markerfacecolor=COLOURS[0] if told else PAPER)
    if zero:
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    name_lines(axes, [label for label, _, _ in estimates])
    axes.set_xlabel(axis)
    return figure


@styled
def by_category(categories: Mapping[str, Mapping[str, tuple[float, "Interval"]]], axis: str) -> "Figure":
    """One block of lines a category, in it one point with its interval a method.

    Args:
        categories: By category and method, a share and its interval.
        axis: What the horizontal axis is, with its unit.
    """
    figure, axes = new_axes(1.4 + categories_height(categories))
    legend_above(figure, draw_categories(axes, categories, axis))
    return figure


def categories_height(categories: Mapping[str, Mapping[str, Any]]) -> float:
    """The inches that the lines of :func:`by_category` take."""
    return len(categories) * max(0.34, 0.11 * max(map(len, categories.values())))


def draw_categories(
    axes: "Axes", categories: Mapping[str, Mapping[str, tuple[float, "Interval"]]], axis: str
) -> list[Any]:
    """:func:`by_category` into axes that are there; gives back what a legend needs."""
    methods = list(dict.fromkeys(name for one in categories.values() for name in one))
    shown: list[Any] = []
    for place, (name, colour, marker) in enumerate(zip(methods, cycle(COLOURS), cycle(MARKERS), strict=False)):
        offset = 0.8 * ((place + 0.5) / len(methods) - 0.5)
        lines = [(i + offset, *one[name]) for i, one in enumerate(categories.values()) if name in one]
        for line, _, (low, high) in lines:
            axes.plot([100 * low, 100 * high], [line, line], color=colour, linewidth=1.2)
        places, shares = [line for line, _, _ in lines], [100 * share for _, share, _ in lines]
        shown += axes.plot(shares, places, marker, color=colour, label=name, markersize=5)
    for i in range(1, len(categories)):
        axes.axhline(i - 0.5, color=INK, linewidth=0.4, alpha=0.4)
    name_lines(axes, list(categories))
    axes.set_xlabel(axis)
    return shown


def shares(
    categories: Mapping[str, Mapping[str, Any]], methods: Sequence[str]
) -> dict[str, dict[str, tuple[float, "Interval"]]]:
    """What :func:`by_category` takes, of these methods, from the categories of :func:`kvfuse.evaluation.scoring.metrics.task_figures`."""
    return {
        category: {
            method: (found["accuracy"], found["interval"])
            for method in methods
            if (found := one["methods"].get(method))
        }
        for category, one in categories.items()
    }


@styled
def latency(methods: Mapping[str, Mapping[str, Any]], phases: Sequence[str]) -> "Figure":
    """Mean time by phase as a stack, with marks at the median and the 95th percentile.

    Args:
        methods: By name, ``median``, ``p95``, ``mean`` and ``phases`` in seconds; see :func:`kvfuse.evaluation.scoring.metrics.latency`.
        phases: All of them, in order.
    """
    figure, axes = new_axes(1.5 + 0.36 * len(methods))
    stacks = [stack(one) for one in methods.values()]
    shown: list[Any] = []
    for phase, colour in zip([*phases, "other"], cycle(COLOURS), strict=False):
        lefts = [sum(list(one.values())[: list(one).index(phase)]) if phase in one else 0 for one in stacks]
        widths = [one.get(phase, 0.0) for one in stacks]
        shown.append(axes.barh(range(len(stacks)), widths, 0.6, lefts, label=phase.replace("_", " "), color=colour))
    for figures, label, marker, size in (("median", "median", "|", 16), ("p95", "95th percentile", "D", 5)):
        times = [1000 * one[figures] for one in methods.values()]
        shown += axes.plot(times, range(len(times)), marker, color=INK, label=label, markersize=size)
    name_lines(axes, list(methods))
    axes.set_xlabel("time of one question asked alone (ms), mean by phase")
    axes.set_xlim(left=0)
    legend_above(figure, shown)
    return figure


def stack(method: Mapping[str, Any]) -> dict[str, float]:
    """Mean milliseconds by phase, and as ``other`` what is in none."""
    phases = {phase: 1000 * seconds for phase, seconds in method["phases"].items()}
    return {**phases, "other": max(1000 * method["mean"] - sum(phases.values()), 0.0)}


@styled
def venn(methods: Sequence[str], regions: Mapping[str, float]) -> "Figure":
    """Items by who has them right: two circles with areas to scale, or three alike ones.

    Args:
        methods: Two or three.
        regions: Items that exactly these have right, by their names joined with ``+``; by an empty name, those that nobody has.
    """
    circles = _circles(methods, regions)
    low, high = _heights(circles)
    figure, axes = new_axes(WIDTH * (high - low) / 8.4)
    draw_venn(axes, methods, regions)
    return figure


def draw_venn(axes: "Axes", methods: Sequence[str], regions: Mapping[str, float]) -> None:
    """:func:`venn` into axes that are there."""
    from matplotlib.patches import Circle as Disc

    circles = _circles(methods, regions)
    low, high = _heights(circles)
    for one, colour in zip(circles, COLOURS, strict=False):
        axes.add_patch(Disc((one.x, one.y), one.radius, facecolor=colour, alpha=0.3, linewidth=0))
        axes.add_patch(Disc((one.x, one.y), one.radius, fill=False, edgecolor=colour, linewidth=1.8))
    for region, count in regions.items():
        if region and (count or len(methods) == 3):
            _write_count(
                axes, number(count), *middle(circles, [name in region.split("+") for name in methods]), low + 0.2
            )
    for name, one, (side, down) in zip(methods, circles, NAME_PLACES, strict=False):
        size = sum(count for region, count in regions.items() if name in region.split("+"))
        place = one.x + side * (one.radius + 0.15), one.y - down
        axes.text(
            *place, f"{name}\n{number(size)} right", ha="left" if side > 0 else "right", va="center", weight="bold"
        )
    axes.text(0, low + 0.2, f"nobody: {number(regions.get('', 0))}", ha="center", va="center")
    axes.set(aspect="equal", xlim=(-4.2, 4.2), ylim=(low, high))
    axes.set_axis_off()


def number(count: float) -> str:
    """A count; one that is an average over seeds with a decimal."""
    return f"{count:,.0f}" if abs(count - round(count)) < 0.05 else f"{count:,.1f}"


def _circles(methods: Sequence[str], regions: Mapping[str, float]) -> Sequence[Circle]:
    return (
        THREE
        if len(methods) == 3
        else two_circles(regions[methods[0]], regions["+".join(methods)], regions[methods[1]])
    )


def _heights(circles: Sequence[Circle]) -> tuple[float, float]:
    """From where to where to draw, with room below."""
    return min(one.y - one.radius for one in circles) - 0.5, max(one.y + one.radius for one in circles) + 0.1


def _write_count(axes: "Axes", count: str, x: float, y: float, room: float, below: float) -> None:
    """In its region; where that is too narrow, below the circles with a line."""
    if room >= 0.16:
        axes.text(x, y, count, ha="center", va="center")
    else:
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.6}
        axes.annotate(count, (x, y), (1.25 * x, below), ha="center", va="center", arrowprops=line)
