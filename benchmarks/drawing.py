"""The picture of a run: ratios with their bars, and the time to the first token by phase."""

import re
from collections.abc import Sequence

from benchmarks.asking import PHASES
from benchmarks.rows import Row
from kvfuse.support.plots import COLOURS, INK, Axes, Figure, name_lines, new_panels, stack_bars, styled

SETTING = re.compile(r"(\w+), 1 x (\d+) tokens")
MIN_BAR = 0.1
"""Smaller bars, of rounding errors, would be invisible."""
RECEIVER = "first token, receiver"
Stacks = dict[int, dict[str, float]]
"""Prompt tokens -> figure -> milliseconds per prompt token."""


@styled
def draw(rows: Sequence[Row]) -> Figure:
    """Ratios above, phases below."""
    ratios = [found for found in rows if found["unit"] == "x" and (found["bar"] or 0) >= MIN_BAR]
    shapes, stacks = _stacks(rows)
    heights = [0.7 + 0.42 * len(ratios), 1.1 + 0.42 * len(stacks)]
    figure, (above, below) = new_panels(sum(heights), rows=2, height_ratios=heights)
    _draw_ratios(above, ratios)
    _draw_stacks(below, shapes, stacks)
    return figure


def _draw_ratios(axes: Axes, ratios: Sequence[Row]) -> None:
    """One line per ratio: blue within its bar, orange beyond it, with the least and the most of all rounds."""
    for line, found in enumerate(ratios):  # line 0 is on top
        value, bar = float(found["value"]), float(found["bar"])
        low, high = (float(found.get(end, value)) for end in ("low", "high"))
        axes.barh(line, value, 0.6, color=COLOURS[0] if value <= bar else COLOURS[1])
        axes.plot([low, high], [line, line], color=INK, linewidth=1)
        axes.plot([bar, bar], [line - 0.4, line + 0.4], color=INK, linewidth=2.5)
        # the number, to the right of everything else on its line
        end = max(high, bar), line
        axes.annotate(f"{value:.2f}", end, (6, 0), textcoords="offset points", va="center", fontsize=9)
    name_lines(axes, [f"{found['figure']}\n{found['setting']}" for found in ratios])
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel("ratio (thick mark: its bar; thin line: all rounds)")


def _draw_stacks(axes: Axes, shapes: str, stacks: Stacks) -> None:
    """One line per length of prompt, with a mark where the receiver alone has its first token."""
    stack_bars(axes, {figure: [stack[figure] for stack in stacks.values()] for figure in PHASES.values()}, 0.5)
    # the receiver alone is a mark, not a phase
    alone = [stack[RECEIVER] for stack in stacks.values()]
    axes.plot(alone, range(len(alone)), "|", color=INK, markersize=24, markeredgewidth=2.5, label="receiver alone")
    name_lines(axes, [f"{shapes}, {tokens:,} tokens" for tokens in stacks])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("time to the first token, ms per prompt token")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=5,
        fontsize=8,
        markerscale=0.5,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _stacks(rows: Sequence[Row]) -> tuple[str, Stacks]:
    """Name and phases of the pair that was measured last, the largest one."""
    wanted = {*PHASES.values(), RECEIVER}
    pairs: dict[str, Stacks] = {"": {}}
    for found in rows:
        if found["figure"] in wanted and (case := SETTING.fullmatch(found["setting"])):
            tokens = int(case[2])  # prompts of all lengths share the axis
            pairs.setdefault(case[1], {}).setdefault(tokens, {})[found["figure"]] = 1e3 * found["value"] / tokens
    shapes, stacks = list(pairs.items())[-1]
    return shapes, dict(sorted(stacks.items()))
