"""How much of the prompt must be fused, and which part of it?

As in the paper's figure 11: the first or the last so many of the prompt's positions alone, and beside them the positions of messages or of
the template alone. Nothing fused is the receiver; all of it is Cache-to-Cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvfuse.analysis.answering import ask
from kvfuse.analysis.curves import curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.methods import Fused
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.message_axis import locate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.25, 0.5, 0.75)
Chosen = Callable[[AlignedRow], np.ndarray]
"""Which positions of a prompt to fuse, ``(n,)`` bool."""


class Partly(Fused):
    """Cache-to-Cache at some of the positions that a fuser would fuse.

    Args:
        pair: The models.
        chosen: Which of them.
    """

    name = "partly fused"

    def __init__(self, pair: CacheToCache, chosen: Chosen) -> None:
        super().__init__(pair)
        self.chosen = chosen

    def align(self, prompt: Prompt) -> AlignedRow:
        """The prompt, less of it to be fused."""
        aligned = self.pair.align(prompt)
        return replace(aligned, fusable=aligned.fusable & self.chosen(aligned))


def first(share: float) -> Chosen:
    """The first so much of what is fusable, rounded to whole positions."""
    return lambda aligned: np.cumsum(aligned.fusable) <= round(share * int(aligned.fusable.sum()))


def last(share: float) -> Chosen:
    """The last so much of it."""
    return lambda aligned: np.cumsum(aligned.fusable[::-1])[::-1] <= round(share * int(aligned.fusable.sum()))


def messages(aligned: AlignedRow) -> np.ndarray:
    """Positions that cover something of a message."""
    return locate(aligned.receiver).in_message


def template(aligned: AlignedRow) -> np.ndarray:
    """All others."""
    return ~messages(aligned)


def run(study: Study, shares: Sequence[float] = SHARES) -> Finding:
    """Ask all questions once for each share, from both ends, and for both kinds of positions.

    Args:
        study: A pair with questions and answers.
        shares: Of the prompt, between 0 and 1; these two are always there.

    Raises:
        AnalysisError: A share is not between 0 and 1, or there are questions without answers.
    """
    if not all(0 < share < 1 for share in shares):
        raise AnalysisError(f"expected shares between 0 and 1, got {list(shares)}; 0 and 1 are there anyway")
    inner = sorted(shares)[: 1 if study.smoke else None]

    def measure(chosen: Chosen) -> dict[str, Any]:
        return ask(study, Partly(study.pair, chosen)).to_dict()

    none, whole = measure(first(0.0)), measure(first(1.0))
    ends = {
        name: [none, *(measure(cut(share)) for share in inner), whole]
        for name, cut in (("first", first), ("last", last))
    }
    figures = {
        "questions": len(study.questions),
        "shares": [0.0, *inner, 1.0],
        "ends": ends,
        "kinds": {"messages": measure(messages), "template": measure(template)},
        "fused_positions": {
            name: _counted(study, chosen) for name, chosen in (("messages", messages), ("template", template))
        },
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def _counted(study: Study, chosen: Chosen) -> float:
    """The share of all fusable positions that is chosen."""
    aligned = [study.pair.align(one.prompt) for one in study.questions]
    return float(sum((one.fusable & chosen(one)).sum() for one in aligned) / sum(one.fusable.sum() for one in aligned))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: both ends, both kinds."""
    none, whole = (100 * figures["ends"]["first"][place]["accuracy"] for place in (0, -1))
    middle = len(figures["shares"]) // 2
    halves = " and ".join(
        f"the {name} {figures['shares'][middle]:.0%} {100 * some[middle]['accuracy']:.1f}%"
        for name, some in figures["ends"].items()
    )
    kinds = ", ".join(
        f"{name} alone ({figures['fused_positions'][name]:.0%} of the positions) {100 * one['accuracy']:.1f}%"
        for name, one in figures["kinds"].items()
    )
    ends = f"With nothing fused {none:.1f}% of the answers are right, with everything {whole:.1f}%; with {halves}."
    return f"{ends} Fused at the positions of {kinds}."


def draw(figures: dict[str, Any]) -> "Figure":
    """Against the fused share, from both ends; both kinds of positions at the share that they make up."""
    ends = {
        f"the {name} part": ([100 * share for share in figures["shares"]], some)
        for name, some in figures["ends"].items()
    }
    kinds = {
        f"{name} alone": ([100 * figures["fused_positions"][name]], [one]) for name, one in figures["kinds"].items()
    }
    return curves("fused share of the prompt's positions (%)", {**ends, **kinds})
