"""How does the gain grow: with the size of the models, the length of prompts, the tokens of training?

As in the paper's figure 6 and table 12, from saved runs of ``kvfuse eval`` and ``kvfuse train``, ordered by a figure in
which they differ. Without runs, a new fuser of the pair's own configuration is trained for some steps, and evaluated at
some of them.
"""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kvfuse.analysis.curves import Point, draw_curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.saved_runs import read_points
from kvfuse.analysis.study import Study
from kvfuse.analysis.training_curve import train_and_ask
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.report.verdict import FUSED, MISMATCHED, RECEIVER, SHARER, points
from kvfuse.support.plots import LOOKS, Figure, legend_above, new_panels, styled

THOUSANDS_FROM = 10_000
"""From here on the axis counts in thousands (k), millions (M) and billions (G)."""
GAIN = "cache-to-cache minus receiver"
METHOD_LOOKS = dict(zip((RECEIVER, SHARER, FUSED, MISMATCHED, GAIN), LOOKS, strict=False))
YLABELS = {
    "methods": "right answers (%), 95% interval",
    "gain": "gain over the receiver (points), 95% interval",
    "bits_per_character": "held-out bits per character",
}
"""The panels, by the key of a point's figures."""


def run(
    study: Study,
    runs: Sequence[str] = (),
    against: str = "training.tokens",
    at: Sequence[float] = (),
    task: str | None = None,
) -> Finding:
    """Compare runs in the order of a figure.

    Args:
        study: Without runs: a pair with questions, and lessons to train on.
        runs: Folders of evaluations or trainings.
        against: The figure in which they differ: a dotted key of a run's ``config.yaml`` or of its training's
            ``result.json``; ``receiver.parameters`` or ``sharer.parameters``; or ``tokens_in``, which splits each
            evaluation into quarters by the number of tokens that the receiver reads.
        at: The figure of each run as a number; ``against`` is then its name.
        task: Of the evaluations; by default the first.

    Raises:
        AnalysisError: A run has no such figure or task, or there is nothing to train on.
        EvaluationError: A folder's predictions are damaged.
    """
    if not runs:
        return train_and_ask(study)
    if at and len(at) != len(runs):
        raise AnalysisError(f"expected a number for each of {len(runs)} runs in at, got {len(at)}; give as many")
    found = [point for folder, x in zip_longest(runs, at) for point in read_points(Path(folder), against, x, task)]
    figures = {"against": against, "points": sorted(found, key=lambda point: point["x"])}
    return Finding(figures, reading(figures), lambda: draw(figures))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the gain at both ends of the axis, and where it is largest."""
    # rows of (gain, position on the axis, words): of answers if there are any, else of losses
    found, rows = figures["points"], []
    for point in found:
        if gain := point.get("gain"):
            words = points(gain["difference"], gain["interval"], signed=True)
            rows.append((gain["difference"], point["x"], f"{words} points"))
    subject = "the gain over the receiver" if rows else "what held-out responses take"
    if not rows:
        losses = [(point["bits_per_character"], point["x"]) for point in found if "bits_per_character" in point]
        rows = [
            (1 - bits["fused"] / bits["receiver"], x, f"{bits['fused']:.3f} bits per character") for bits, x in losses
        ]
    if not rows:
        return f"No run has answers of both {RECEIVER} and {FUSED}. There is no gain to compare."
    (_, low, first), (_, high, last), (_, best, _) = rows[0], rows[-1], max(rows)
    axis = f"From {figures['against']} {low:,.0f} to {high:,.0f}"
    return f"{axis}, {subject} goes from {first} to {last}. The gain is largest at {best:,.0f}."


@styled
def draw(figures: dict[str, Any]) -> Figure:
    """Right answers, the gain and bits per character: a panel for each that the runs have."""
    from matplotlib.ticker import EngFormatter

    found = figures["points"]
    kinds = [kind for kind in YLABELS if any(kind in point for point in found)]
    figure, panels = new_panels(4.2, len(kinds))
    handles: dict[str, Any] = {}
    for axes, kind in zip(panels, kinds, strict=True):
        handles |= draw_curves(axes, _curves(found, kind), METHOD_LOOKS)
        # 600000000 -> 600M
        if max(point["x"] for point in found) >= THOUSANDS_FROM:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel=figures["against"], ylabel=YLABELS[kind])
    legend_above(figure, list(handles.values()))
    return figure


def _curves(found: Sequence[dict[str, Any]], kind: str) -> dict[str, list[Point]]:
    """The points of one panel by method, in percent where they are shares."""
    curves: dict[str, list[Point]] = {}
    for point in found:
        measured = point.get(kind, {})
        # the gain is drawn like a method
        if kind == "gain" and measured:
            measured = {GAIN: {"accuracy": measured["difference"], "interval": measured["interval"]}}
        for name, value in measured.items():
            if kind == "bits_per_character":
                curves.setdefault(FUSED if name == "fused" else name, []).append((point["x"], value, (value, value)))
            else:
                low, high = value["interval"]
                curves.setdefault(name, []).append((point["x"], 100 * value["accuracy"], (100 * low, 100 * high)))
    return curves
