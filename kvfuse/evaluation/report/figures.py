"""Pictures of a report: intervals, categories, overlap, time by phase."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from typing import TYPE_CHECKING, Any

from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER
from kvfuse.support.plots import COLOURS, INK, MARKERS, PAPER, legend_above, name_lines, new_axes, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from kvfuse.evaluation.scoring.statistics import Interval

Estimate = tuple[str, float, "Interval"]
"""A label, a share and its interval."""
Shares = Mapping[str, Mapping[str, tuple[float, "Interval"]]]
"""By category and method, a share and its interval."""

KNEW = {RECEIVER: "only the receiver", SHARER: "only the sharer", f"{RECEIVER}+{SHARER}": "both", "": "neither"}
"""Who has an item right without fusing."""
OUTCOMES = {"right": COLOURS[2], "wrong": COLOURS[5]}


@styled
def forest(estimates: Sequence[Estimate], axis: str, zero: bool = False) -> "Figure":
    """Draw points with their intervals, one per line, from the top.

    Args:
        estimates: Shares, which are shown as percent.
        axis: Label of the horizontal axis, with its unit.
        zero: Draw a line at zero; points whose interval contains it are hollow.
    """
    figure, axes = new_axes(0.9 + 0.3 * len(estimates))
    for i, (_, share, (low, high)) in enumerate(estimates):
        filled = not zero or low > 0 or high < 0
        axes.plot([100 * low, 100 * high], [i, i], color=COLOURS[0], linewidth=2, solid_capstyle="butt")
        axes.plot(100 * share, i, "o", color=COLOURS[0], markersize=7, markerfacecolor=COLOURS[0] if filled else PAPER)
    if zero:  # the reference line
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    name_lines(axes, [label for label, _, _ in estimates])
    axes.set_xlabel(axis)
    return figure


@styled
def by_category(categories: Shares, axis: str) -> "Figure":
    """Draw one block of lines per category, with one point and its interval per method.

    Args:
        categories: What to draw.
        axis: Label of the horizontal axis, with its unit.
    """
    figure, axes = new_axes(1.4 + categories_height(categories))
    legend_above(figure, draw_categories(axes, categories, axis))
    return figure


def categories_height(categories: Mapping[str, Mapping[str, Any]]) -> float:
    """Returns the height in inches of the lines of :func:`by_category`."""
    return len(categories) * max(0.34, 0.11 * max(map(len, categories.values())))


def draw_categories(axes: "Axes", categories: Shares, axis: str) -> list[Any]:
    """Draw :func:`by_category` into existing axes; returns the legend handles."""
    methods = list(dict.fromkeys(name for shares in categories.values() for name in shares))
    handles: list[Any] = []
    for index, (name, colour, marker) in enumerate(zip(methods, cycle(COLOURS), cycle(MARKERS), strict=False)):
        # the methods of a category stand below each other, within 0.8 of a line
        offset = 0.8 * ((index + 0.5) / len(methods) - 0.5)
        points = [(i + offset, *shares[name]) for i, shares in enumerate(categories.values()) if name in shares]
        for line, _, (low, high) in points:
            axes.plot([100 * low, 100 * high], [line, line], color=colour, linewidth=1.2)
        lines, shares = [line for line, _, _ in points], [100 * share for _, share, _ in points]
        handles += axes.plot(shares, lines, marker, color=colour, label=name, markersize=5)
    # thin rules between categories
    for i in range(1, len(categories)):
        axes.axhline(i - 0.5, color=INK, linewidth=0.4, alpha=0.4)
    name_lines(axes, list(categories))
    axes.set_xlabel(axis)
    return handles


def shares(categories: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> Shares:
    """Returns the input of :func:`by_category` for these methods.

    Args:
        categories: From :func:`kvfuse.evaluation.scoring.metrics.task_figures`.
        methods: To draw.
    """
    shares = {}
    for category, figures in categories.items():
        found = {name: figures["methods"][name] for name in methods if name in figures["methods"]}
        shares[category] = {name: (figure["accuracy"], figure["interval"]) for name, figure in found.items()}
    return shares


@styled
def latency(methods: Mapping[str, Mapping[str, Any]], phases: Sequence[str]) -> "Figure":
    """Draw the mean time by phase as stacked bars, with marks at the median and the 95th percentile.

    Args:
        methods: By name, ``median``, ``p95``, ``mean`` and ``phases`` in seconds
            (:func:`kvfuse.evaluation.scoring.metrics.latency`).
        phases: All of them, in order.
    """
    figure, axes = new_axes(1.5 + 0.36 * len(methods))
    lines, stages = range(len(methods)), [*phases, "other"]
    spent = [milliseconds(method) for method in methods.values()]
    widths = [[times.get(phase, 0.0) for phase in stages] for times in spent]  # (methods, stages)
    # a bar begins where the phases before it end
    lefts = [list(accumulate(row, initial=0.0)) for row in widths]
    handles: list[Any] = []
    for column, (phase, colour) in enumerate(zip(stages, cycle(COLOURS), strict=False)):
        bars = [row[column] for row in widths], 0.6, [row[column] for row in lefts]
        handles.append(axes.barh(lines, *bars, label=phase.replace("_", " "), color=colour))
    for key, label, marker, size in (("median", "median", "|", 16), ("p95", "95th percentile", "D", 5)):
        # marks of single questions, on top of the means
        times = [1000 * method[key] for method in methods.values()]
        handles += axes.plot(times, lines, marker, color=INK, label=label, markersize=size)
    name_lines(axes, list(methods))
    axes.set_xlabel("time of a single question (ms), mean by phase")
    axes.set_xlim(left=0)
    legend_above(figure, handles)
    return figure


def milliseconds(method: Mapping[str, Any]) -> dict[str, float]:
    """Returns a method's mean milliseconds by phase; ``other`` is the rest."""
    phases = {phase: 1000 * seconds for phase, seconds in method["phases"].items()}
    return {**phases, "other": max(1000 * method["mean"] - sum(phases.values()), 0.0)}


def knowledge(methods: Sequence[str], regions: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns the numbers of items right and wrong when fused, by who has them right without (keys of :data:`KNEW`).

    Args:
        methods: Receiver, cache-to-cache, and the sharer if it was asked.
        regions: Number of items that exactly these methods have right, by their names joined with ``+``.
    """
    groups = [name for name in KNEW if SHARER in methods or SHARER not in name]
    return {name: {"right": regions[f"{name}+{FUSED}" if name else FUSED], "wrong": regions[name]} for name in groups}


@styled
def overlap(known: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Draw :func:`knowledge` as bars: what fusing keeps and loses of each model's knowledge, and what it adds."""
    figure, axes = new_axes(overlap_height(known) + 0.8)
    draw_overlap(axes, known)
    return figure


def overlap_height(known: Mapping[str, Any]) -> float:
    """Returns the height in inches of the bars of :func:`overlap`."""
    return 0.55 * len(known)


def draw_overlap(axes: "Axes", known: Mapping[str, Mapping[str, float]]) -> None:
    """Draw :func:`overlap` into existing axes."""
    for index, (outcome, colour) in enumerate(OUTCOMES.items()):
        counts = [items[outcome] for items in known.values()]
        # the two bars of a group lie on both sides of its line
        lines = [line + 0.4 * index - 0.2 for line in range(len(known))]
        bars = axes.barh(lines, counts, 0.38, color=colour, label=f"{outcome} when fused")
        axes.bar_label(bars, list(map(number, counts)), padding=3)
    name_lines(axes, [KNEW[name] for name in known])
    axes.margins(x=0.1)  # room for the labels
    axes.set_xlabel("items, by who has them right without fusing")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def number(count: float) -> str:
    """Returns a count as text, with a decimal where it is an average over seeds."""
    return f"{count:,.0f}" if abs(count - round(count)) < 0.05 else f"{count:,.1f}"
