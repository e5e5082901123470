"""Which layers does the fused cache need? One fused alone, one left out.

All layers are Cache-to-Cache, none is the receiver. What a layer gives alone and what it costs to leave it out differ where layers do the
same, or work only together.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kvfuse.analysis.answering import ask
from kvfuse.analysis.curves import curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.fusers import Fuser
from kvfuse.methods import Fused
from kvfuse.model import CacheToCache
from kvfuse.support.plots import count_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SomeLayers(Fused):
    """Cache-to-Cache in some of the receiver's layers; the others keep what they hold.

    Args:
        pair: The models.
        layers: Which of them, counted from 0.
    """

    name = "some layers"

    def __init__(self, pair: CacheToCache, layers: Collection[int]) -> None:
        super().__init__(pair)
        self.layers = layers

    @property
    def fusers(self) -> list[nn.Module]:
        """The pair's own, silent in the other layers."""
        return [_InLayers(fuser, self.layers) for fuser in self.pair.fusers]


class _InLayers(nn.Module):
    def __init__(self, fuser: Fuser, layers: Collection[int]) -> None:
        super().__init__()
        self.fuser, self.layers = fuser, layers

    def forward(self, receiver: KV, sharer: KV) -> KV:
        residual = self.fuser(receiver=receiver, sharer=sharer)
        out = residual.zeros_like()
        places = torch.tensor(sorted(self.layers), dtype=torch.long)
        out.key[places], out.value[places] = residual.key[places], residual.value[places]
        return out


def run(study: Study) -> Finding:
    """Ask all questions once with each layer alone, and once without it.

    Args:
        study: A pair with questions and answers.

    Raises:
        AnalysisError: There are questions without answers.
    """
    layers = range(study.pair.fusers[0].config.receiver_kv.num_layers)

    def measure(chosen: Collection[int]) -> dict[str, Any]:
        return ask(study, SomeLayers(study.pair, chosen)).to_dict()

    figures = {
        "questions": len(study.questions),
        "none": measure([]),
        "all": measure(layers),
        "alone": [measure([layer]) for layer in layers],
        "without": [measure([other for other in layers if other != layer]) for layer in layers],
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the best layer alone, the worst to leave out, by right answers, then by the surprise at them."""
    alone, without = (
        [(one["accuracy"], -one["bits_per_character"]) for one in figures[name]] for name in ("alone", "without")
    )
    best, worst = alone.index(max(alone)), without.index(min(without))
    none, whole = (100 * figures[name]["accuracy"] for name in ("none", "all"))
    return (
        f"The receiver alone has {none:.1f}% right, fused in all layers {whole:.1f}%; of single layers, layer {best} alone gives most, "
        f"{100 * alone[best][0]:.1f}%. Leaving out layer {worst} costs most: {100 * without[worst][0]:.1f}% are left."
    )


def draw(figures: dict[str, Any]) -> "Figure":
    """By layer, with the receiver and Cache-to-Cache as levels."""
    places = range(len(figures["alone"]))
    series = {"this layer alone": (places, figures["alone"]), "all but this layer": (places, figures["without"])}
    figure = curves(
        "receiver layer (0 = first)",
        series,
        {"receiver": figures["none"], "cache-to-cache": figures["all"]},
        joined=False,
    )
    for axes in figure.axes:
        count_whole(axes.xaxis)
    return figure
