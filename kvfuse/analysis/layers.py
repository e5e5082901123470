"""Which layers does the fused cache need? One fused alone, one left out.

Fused in all layers the receiver is Cache-to-Cache, in none it is alone. A layer's gain alone and its loss when left out
differ where layers do the same, or work only together.
"""

from collections.abc import Collection
from typing import Any

from torch import nn

from kvfuse.analysis.answering import ask
from kvfuse.analysis.curves import curves
from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.methods import Fused
from kvfuse.model import CacheToCache
from kvfuse.support.plots import Figure, count_whole


class FusedLayers(Fused):
    """Cache-to-Cache in a subset of the receiver's layers; the others keep their own cache.

    Args:
        pair: The models.
        layers: Their indices, counted from 0.
    """

    name = "some layers"

    def __init__(self, pair: CacheToCache, layers: Collection[int]) -> None:
        super().__init__(pair)
        self.layers = layers

    @property
    def fusers(self) -> list[nn.Module]:
        """The pair's fusers, without their residual in the other layers."""
        return [_InLayers(fuser, self.layers) for fuser in self.pair.fusers]


class _InLayers(nn.Module):
    """A fuser whose residual is zero outside of ``layers``."""

    def __init__(self, fuser: nn.Module, layers: Collection[int]) -> None:
        super().__init__()
        self.fuser, self.layers = fuser, layers

    def forward(self, receiver: KV, sharer: KV) -> KV:
        residual = self.fuser(receiver=receiver, sharer=sharer)  # (L, 1, H, N, D)
        # zero the residual elsewhere, so that the cache keeps what it holds
        kept = [float(layer in self.layers) for layer in range(len(residual.key))]
        mask = residual.key.new_tensor(kept)[:, None, None, None, None]  # (L, 1, 1, 1, 1)
        return KV(residual.key * mask, residual.value * mask)


def run(study: Study) -> Finding:
    """Ask all questions with each layer fused alone, and with each layer left out.

    Args:
        study: A pair with questions and answers.

    Raises:
        AnalysisError: There are questions without answers.
    """
    layers = range(study.pair.receiver.kv_spec.num_layers)

    def measure(fused: Collection[int]) -> dict[str, Any]:
        return ask(study, FusedLayers(study.pair, fused)).to_dict()

    figures = {
        "questions": len(study.questions),
        "none": measure([]),
        "all": measure(layers),
        "alone": [measure([layer]) for layer in layers],
        "without": [measure([other for other in layers if other != layer]) for layer in layers],
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the best layer alone, and the worst one to leave out; bits per character break ties."""
    alone, without = (
        [(found["accuracy"], -found["bits_per_character"]) for found in figures[name]] for name in ("alone", "without")
    )
    # ties in accuracy are common: few questions, few layers
    best, worst = alone.index(max(alone)), without.index(min(without))
    none, whole = (100 * figures[name]["accuracy"] for name in ("none", "all"))
    return (
        f"The receiver alone has {none:.1f}% right, fused in all layers {whole:.1f}%; of single layers, layer {best} "
        f"alone gives most, {100 * alone[best][0]:.1f}%. Leaving out layer {worst} costs most: "
        f"{100 * without[worst][0]:.1f}% are left."
    )


def draw(figures: dict[str, Any]) -> Figure:
    """Accuracy and bits per character by layer, with the receiver and Cache-to-Cache as levels."""
    layers = range(len(figures["alone"]))
    series = {"this layer alone": (layers, figures["alone"]), "all but this layer": (layers, figures["without"])}
    levels = {"receiver": figures["none"], "cache-to-cache": figures["all"]}
    figure = curves("receiver layer (0 = first)", series, levels, joined=False)
    for axes in figure.axes:
        count_whole(axes.xaxis)
    return figure
