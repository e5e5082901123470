"""How much of the prompt must be fused, and which part of it?

As in the paper's figure 11: only the first or the last share of the prompt's positions is fused, and besides, only the
positions of messages or only those of the template. Fusing nothing is the receiver; fusing everything is
Cache-to-Cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvfuse.analysis.answering import ask
from kvfuse.analysis.curves import curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import in_message
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.methods import Fused
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.messages import Prompt
from kvfuse.support.plots import Figure

SHARES = (0.25, 0.5, 0.75)
Choice = Callable[[AlignedRow], np.ndarray]
"""Selects positions of a prompt, ``(n,)`` bool."""


class PartlyFused(Fused):
    """Cache-to-Cache at a subset of the fusable positions.

    Args:
        pair: The models.
        choice: Selects the positions to fuse.
    """

    name = "partly fused"

    def __init__(self, pair: CacheToCache, choice: Choice) -> None:
        super().__init__(pair)
        self.choice = choice

    def align(self, prompt: Prompt) -> AlignedRow:
        """The aligned prompt with fewer fusable positions."""
        aligned = self.pair.align(prompt)
        return replace(aligned, fusable=aligned.fusable & self.choice(aligned))


def first(share: float) -> Choice:
    """The first ``share`` of the fusable positions, rounded to whole positions."""
    return lambda aligned: np.cumsum(aligned.fusable) <= round(share * int(aligned.fusable.sum()))


def last(share: float) -> Choice:
    """The last ``share`` of the fusable positions, rounded to whole positions."""
    return lambda aligned: np.cumsum(aligned.fusable[::-1])[::-1] <= round(share * int(aligned.fusable.sum()))


def messages(aligned: AlignedRow) -> np.ndarray:
    """Positions that cover characters of a message."""
    return in_message(aligned.receiver)


def template(aligned: AlignedRow) -> np.ndarray:
    """Positions of the template: all others."""
    return ~messages(aligned)


ENDS = {"first": first, "last": last}
KINDS = {"messages": messages, "template": template}


def run(study: Study, shares: Sequence[float] = SHARES) -> Finding:
    """Ask all questions once for each share, from both ends, and for both kinds of positions.

    Args:
        study: A pair with questions and answers.
        shares: Shares of the prompt to fuse, between 0 and 1; 0 and 1 are always measured.

    Raises:
        AnalysisError: A share is not between 0 and 1, or there are questions without answers.
    """
    if not all(0 < share < 1 for share in shares):
        raise AnalysisError(f"expected shares between 0 and 1, got {list(shares)}; 0 and 1 are there anyway")
    # a smoke run measures one share only
    inner = sorted(shares)[: 1 if study.smoke else None]

    def measure(choice: Choice) -> dict[str, Any]:
        return ask(study, PartlyFused(study.pair, choice)).to_dict()

    # both ends of the axis are the same for both orders: measured once
    none, whole = measure(first(0.0)), measure(first(1.0))
    figures = {
        "questions": len(study.questions),
        "shares": [0.0, *inner, 1.0],
        "ends": {name: [none, *(measure(end(share)) for share in inner), whole] for name, end in ENDS.items()},
        "kinds": {name: measure(kind) for name, kind in KINDS.items()},
        "fused_positions": {name: _share_of(study, kind) for name, kind in KINDS.items()},
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def _share_of(study: Study, choice: Choice) -> float:
    """The chosen share of all fusable positions."""
    rows = [study.pair.align(question.prompt) for question in study.questions]
    return float(sum((row.fusable & choice(row)).sum() for row in rows) / sum(row.fusable.sum() for row in rows))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: by share from both ends, and by kind of position."""
    none, whole = (100 * figures["ends"]["first"][index]["accuracy"] for index in (0, -1))
    # the middle share stands for the curves
    middle = len(figures["shares"]) // 2
    halves = " and ".join(
        f"the {name} {figures['shares'][middle]:.0%} {100 * measured[middle]['accuracy']:.1f}%"
        for name, measured in figures["ends"].items()
    )
    kinds = ", ".join(
        f"{name} alone ({figures['fused_positions'][name]:.0%} of the positions) {100 * found['accuracy']:.1f}%"
        for name, found in figures["kinds"].items()
    )
    return (
        f"With nothing fused {none:.1f}% of the answers are right, with everything {whole:.1f}%; with {halves}. "
        f"Fused at the positions of {kinds}."
    )


def draw(figures: dict[str, Any]) -> Figure:
    """By fused share, from both ends; both kinds of positions at the share that they make up."""
    percent = [100 * share for share in figures["shares"]]
    ends = {f"the {name} part": (percent, measured) for name, measured in figures["ends"].items()}
    # single points, at the share of positions that each kind makes up
    kinds = {
        f"{name} alone": ([100 * figures["fused_positions"][name]], [found]) for name, found in figures["kinds"].items()
    }
    return curves("fused share of the prompt's positions (%)", {**ends, **kinds})
