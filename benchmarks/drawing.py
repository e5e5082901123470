"""The picture of a run: ratios beside their bars, and where the time to the first token goes."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.asking import PHASES
from benchmarks.rows import Row
from kvfuse.support.plots import COLOURS, INK, name_lines, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CASE = re.compile(r"(\w+), 1 x (\d+) tokens")
LEAST_BAR = 0.1
"""Rounding errors have bars too, which nobody could see."""
Stacks = dict[int, dict[str, float]]
"""Prompt tokens -> figure -> milliseconds per prompt token."""


@styled
def draw(rows: Sequence[Row]) -> "Figure":
    """Both pictures, one below the other."""
    ratios = [found for found in rows if found["unit"] == "x" and (found["bar"] or 0) >= LEAST_BAR]
    shapes, stacks = _stacks(rows)
    heights = [0.7 + 0.42 * len(ratios), 1.1 + 0.42 * len(stacks)]
    figure, (above, below) = new_panels(sum(heights), rows=2, height_ratios=heights)
    _draw_ratios(above, ratios)
    _draw_stacks(below, shapes, stacks)
    return figure


def _draw_ratios(axes: "Axes", ratios: Sequence[Row]) -> None:
    """A line each: blue within its bar, orange beyond it, from the least of all rounds to the most."""
    for place, found in enumerate(ratios):
        value, bar = float(found["value"]), float(found["bar"])
        low, high = (float(found.get(end, value)) for end in ("low", "high"))
        axes.barh(place, value, 0.6, color=COLOURS[0] if value <= bar else COLOURS[1])
        axes.plot([low, high], [place, place], color=INK, linewidth=1)
        axes.plot([bar, bar], [place - 0.4, place + 0.4], color=INK, linewidth=2.5)
        axes.annotate(
            f"{value:.2f}", (max(high, bar), place), (6, 0), textcoords="offset points", va="center", fontsize=9
        )
    name_lines(axes, [f"{found['figure']}\n{found['setting']}" for found in ratios])
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("ratio (thick mark: its bar; thin line: all rounds)")


def _draw_stacks(axes: "Axes", shapes: str, stacks: Stacks) -> None:
    """A line for each length of prompt, and a mark where the receiver alone has its first token."""
    places, lefts = range(len(stacks)), [0.0] * len(stacks)
    for figure, colour in zip(PHASES.values(), COLOURS, strict=False):
        widths = [one[figure] for one in stacks.values()]
        axes.barh(places, widths, 0.5, lefts, color=colour, label=figure)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    alone = [one["first token, receiver"] for one in stacks.values()]
    axes.plot(alone, places, "|", color=INK, markersize=24, markeredgewidth=2.5, label="receiver alone")
    name_lines(axes, [f"{shapes}, {tokens:,} tokens" for tokens in stacks])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("time to the first token, ms per prompt token")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=5,
        fontsize=8,
        markerscale=0.5,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _stacks(rows: Sequence[Row]) -> tuple[str, Stacks]:
    """Of the last pair that was measured: the largest one."""
    wanted = {*PHASES.values(), "first token, receiver"}
    pairs: dict[str, Stacks] = {"": {}}
    for found in rows:
        if found["figure"] in wanted and (case := CASE.fullmatch(found["setting"])):
            tokens = int(case[2])
            pairs.setdefault(case[1], {}).setdefault(tokens, {})[found["figure"]] = 1e3 * found["value"] / tokens
    shapes, stacks = list(pairs.items())[-1]
    return shapes, dict(sorted(stacks.items()))
