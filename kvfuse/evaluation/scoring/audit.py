"""The audit: how much of a gain is communication, and how much an adapter that any message would set off.

G is what fusing gains over the receiver, P what it gains over a sharer that read another question, the mean of three
derangements; harm is what that other message costs the receiver (Draft-KV, https://arxiv.org/abs/2609.34754).
"""

from typing import Any

import numpy as np

from kvfuse.evaluation.report.verdict import FUSED, RECEIVER, SHARER, points
from kvfuse.evaluation.scoring import statistics
from kvfuse.evaluation.scoring.statistics import MIN_ITEMS
from kvfuse.evaluation.scoring.task_scores import TaskScores

ADAPTER, TEXT = "adapter-only", "text-to-text"
RIVALS = (RECEIVER, SHARER, TEXT, "lora", "prefix")
"""What fusing must beat to be worth its cost: each model, text, and the receiver trained alone."""
DERANGED = "deranged-"
OTHERS = ("zeroed", "moment-matched", "random-fuser")

Figures = dict[str, Any]


def audit(task: TaskScores, methods: Figures) -> Figures | None:
    """Returns the audit of one task; None without answers of receiver, cache-to-cache and a derangement.

    Args:
        task: Its scores.
        methods: Figures of each method, from :func:`kvfuse.evaluation.scoring.metrics.task_figures`.
    """
    deranged = [name for name in task.scores if name.startswith(DERANGED)]
    if not deranged or not {RECEIVER, FUSED} <= task.scores.keys():
        return None
    others = [name for name in (SHARER, ADAPTER, *RIVALS, *OTHERS) if name in task.scores]
    answered = task.answered(RECEIVER, FUSED, *deranged, *others)
    if not answered.any():
        return None
    # 1) Scores of the items that all have answered
    groups = task.groups[answered]
    scores = {name: task.mean(name)[answered] for name in dict.fromkeys((RECEIVER, FUSED, *others))}
    other_message = np.mean([task.mean(name)[answered] for name in deranged], axis=0)

    def difference(first: np.ndarray, second: np.ndarray) -> Figures:
        value, interval = statistics.bootstrap_mean(first - second, groups)
        return {"difference": value, "interval": interval}

    # 2) G, P and harm
    figures: Figures = {
        "items": int(answered.sum()),
        "derangements": len(deranged),
        "gain": difference(scores[FUSED], scores[RECEIVER]),
        "pairing_gain": difference(scores[FUSED], other_message),
        "harm": difference(scores[RECEIVER], other_message),
    }
    # 3) What an adapter alone keeps of G, and what any other way of answering leaves of it
    if ADAPTER in scores:
        figures["over_adapter"] = difference(scores[FUSED], scores[ADAPTER])
        if figures["gain"]["interval"][0] > 0:
            share, interval = statistics.bootstrap_ratio(
                part=scores[ADAPTER] - scores[RECEIVER], whole=scores[FUSED] - scores[RECEIVER], groups=groups
            )
            figures["retained"] = {"share": share, "interval": interval}
    best = max((name for name in RIVALS if name in scores), key=lambda name: float(scores[name].mean()))
    figures["best"] = {"method": best, **difference(scores[FUSED], scores[best])}
    # 4) Kept of what each model alone has right
    figures["kept"] = methods[FUSED]["kept"]
    return {"verdict": _verdict(figures), **figures}


def table(figures: Figures) -> list[tuple[str, str]]:
    """Returns the rows of an audit: a name, and a figure with its interval."""
    rows = [
        ("G: cache-to-cache minus receiver", _signed(figures["gain"])),
        (f"P: minus deranged (mean of {figures['derangements']})", _signed(figures["pairing_gain"])),
        ("harm: receiver minus deranged", _signed(figures["harm"])),
    ]
    if "over_adapter" in figures:
        rows.append(("minus adapter-only", _signed(figures["over_adapter"])))
    if "retained" in figures:
        retained = figures["retained"]
        rows.append(("share of G that adapter-only keeps, %", points(retained["share"], retained["interval"])))
    rows.append((f"minus the best of the others ({figures['best']['method']})", _signed(figures["best"])))
    for name, kept in figures["kept"].items():
        rows.append((f"kept of what the {name} alone has right, %", points(kept["share"], kept["interval"])))
    return rows


def _verdict(figures: Figures) -> str:
    """Returns three sentences: the gain, the part that is communication, and the worth against other ways."""
    if figures["items"] < MIN_ITEMS:
        return f"No verdict from {figures['items']:,} items, which takes {MIN_ITEMS}."
    gain, pairing, best = figures["gain"], figures["pairing_gain"], figures["best"]
    # 1) G
    low, high = gain["interval"]
    effect = "raises" if low > 0 else "lowers" if high < 0 else "does not measurably change"
    first = f"Fusing {effect} the receiver's score (G = {_signed(gain)} points)."
    # 2) P, and the adapter
    adapter = f"; adapter-only keeps {100 * figures['retained']['share']:.0f}% of G" if "retained" in figures else ""
    if pairing["interval"][0] > 0:
        shown = "Communication is part of it: another question's message does worse"
    else:
        shown = "No communication can be shown: another question's message does as well"
    second = f"{shown} (P = {_signed(pairing)}){adapter}."
    # 3) The best of the others
    low, high = best["interval"]
    against = "beats" if low > 0 else "is behind" if high < 0 else "is no better than"
    return f"{first} {second} It {against} the best of the others, {best['method']} ({_signed(best)} points)."


def _signed(figure: Figures) -> str:
    return points(figure["difference"], figure["interval"], signed=True)
