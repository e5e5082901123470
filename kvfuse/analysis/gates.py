"""Which layers and heads does the fuser open, and how much weight does it give them?

Over a data set, as in the paper's A.4.2: gates as they are at inference, the mean weight of each head over all fused
tokens, and the effect of both: the size of the residual relative to the cache that it is added to.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.hooks import Observer, observe
from kvfuse.analysis.readout import read_batches
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.fusers import Fuser
from kvfuse.fusers.groups import PARTS
from kvfuse.fusers.layers import HeadWeights
from kvfuse.support import plots

NAMES = {"key": "keys", "value": "values"}
CROSSED = " (crossed out: gate closed)"
MAX_LAYERS_WITH_NUMBERS = 12
"""Maps of more layers have no room for numbers in their cells."""


def run(study: Study) -> Finding:
    """Read all questions and observe the fusers.

    Args:
        study: A pair with prompts; answers are not needed.

    Raises:
        AnalysisError: Nothing is fused.
    """
    # 1) Observe every fuser and its head weights while all questions are fused.
    records = [FuserRecord(fuser) for fuser in study.pair.fusers]
    observers = {module: observer for record in records for module, observer in record.observers().items()}
    with torch.no_grad(), observe(observers):
        for batch in read_batches(study):
            batch.fuse()
    # 2) A fuser that saw no token has no means.
    if not all(record.tokens for record in records):
        raise AnalysisError("expected prompts of which something is fused, got none; use longer ones")
    figures = {"questions": len(study.questions), "sharers": [record.to_dict() for record in records]}
    return Finding(figures, reading(figures), lambda: draw(figures))


class FuserRecord:
    """Weights and residuals of a fuser of any kind, summed over tokens.

    Args:
        fuser: The fuser to observe, with or without gates and weights.
    """

    def __init__(self, fuser: Fuser) -> None:
        self.fuser = fuser
        self.tokens = 0
        self.weights: Tensor | None = None  # (G, H) float64, G: layers of the keys, then of the values
        self.residual, self.receiver = torch.zeros(()), torch.zeros(())  # sums of squares, then (2, L, H)

    def observers(self) -> dict[nn.Module, Observer]:
        """The modules to observe, with what records them."""
        weights: dict[nn.Module, Observer] = {
            module: self._add_weights for module in self.fuser.modules() if isinstance(module, HeadWeights)
        }
        return {self.fuser: self._add_residual, **weights}

    def to_dict(self) -> dict[str, Any]:
        """By ``keys`` and ``values``: ``open``, ``weight`` and ``relative_size``, each by layer and head."""
        gates = self.fuser.open_gates()
        weights = self._mean_weights()
        figures: dict[str, Any] = {
            "tokens": self.tokens,
            "gates": {name: opened.tolist() for name, opened in gates.items()},
        }
        for (part, name), size in zip(NAMES.items(), (self.residual / self.receiver).sqrt(), strict=True):  # (L, H)
            opened = gates.get(name, gates.get("layers"))
            figures[name] = {
                "open": None if opened is None else opened.reshape(len(opened), -1).expand_as(size).tolist(),
                "weight": weights[part].tolist() if part in weights else None,
                "relative_size": size.tolist(),
            }
        return figures

    def _mean_weights(self) -> dict[str, Tensor]:
        """``(L, H)`` by part; without the parts that have no weights."""
        if self.weights is None:
            return {}
        layers = self.fuser.config.receiver_kv.num_layers
        # the network weights either both parts, or the one that the fuser is for
        parts = PARTS if len(self.weights) > layers else tuple(getattr(self.fuser, "parts", PARTS))
        return dict(zip(parts, (self.weights / self.tokens).split(layers), strict=True))

    def _add_weights(self, _: tuple[Any, ...], weights: Tensor) -> None:
        summed = weights.double().sum(dim=1).cpu()  # (G, N, H) -> (G, H)
        self.weights = summed if self.weights is None else self.weights + summed

    def _add_residual(self, inputs: tuple[KV, ...], residual: KV) -> None:
        receiver = inputs[0]
        self.tokens += residual.key.shape[1] * residual.key.shape[3]
        self.residual, self.receiver = self.residual + _squares(residual), self.receiver + _squares(receiver)


def reading(figures: dict[str, Any]) -> str:
    """Two sentences on the first sharer's fuser."""
    fuser = figures["sharers"][0]
    flags = [flag for name in NAMES.values() for layer in fuser[name]["open"] or [] for flag in layer]
    opened = f"{100 * sum(flags) / len(flags):.0f}% of the heads' gates are open" if flags else "The fuser has no gates"
    sizes = ", ".join(f"{_mean(fuser[name]['relative_size']):.2f} of the receiver's {name}" for name in NAMES.values())
    weights = [f"{name} {_mean(fuser[name]['weight']):.2f}" for name in NAMES.values() if fuser[name]["weight"]]
    weighed = f"The mean weight of a head is for {', for '.join(weights)}; w" if weights else "W"
    return f"Over {fuser['tokens']:,} tokens: {opened}. {weighed}hat is added measures on average {sizes}."


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """Maps of layers by heads: weights above, sizes below, closed gates crossed out; one pair of rows per sharer."""
    shown = [
        (fuser, kind)
        for fuser in figures["sharers"]
        for kind in ("weight", "relative_size")
        if any(fuser[name][kind] for name in NAMES.values())
    ]
    # panels grow with the number of heads
    heads = len(figures["sharers"][0]["keys"]["relative_size"][0])
    figure, panels = plots.new_panels(len(shown) * (1.75 + 0.17 * heads), 2, len(shown))
    for row, (fuser, kind) in enumerate(shown):
        # keys and values share one scale
        top = 1.0 if kind == "weight" else max(max(map(max, fuser[name][kind])) for name in NAMES.values())
        pair, images = panels[2 * row : 2 * row + 2], []
        for axes, name in zip(pair, NAMES.values(), strict=True):
            opened = fuser[name]["open"]
            images.append(_draw_map(axes, fuser[name][kind], opened, top))
            closed = opened is not None and not all(map(all, opened))
            axes.set_title(name + CROSSED * closed, fontsize=10, weight="bold")
        label = "mean weight (0 to 1)" if kind == "weight" else "size of what is added\n/ of the receiver's own"
        figure.colorbar(next(filter(None, images)), ax=pair, label=label, pad=0.02)
    return figure


def _draw_map(axes: plots.Axes, values: list[list[float]] | None, opened: list[list[bool]] | None, top: float) -> Any:
    """Layers from left to right, heads from the top; returns the image, None without values."""
    axes.set(xlabel="receiver layer", ylabel="KV head")
    if values is None:
        axes.text(0.5, 0.5, "no weights", ha="center", va="center", transform=axes.transAxes)
        return None
    image = axes.imshow(torch.tensor(values).T.numpy(), cmap="cividis", vmin=0, vmax=top or 1, aspect="auto")
    plots.count_whole(axes.xaxis)
    plots.count_whole(axes.yaxis)
    size = min(13, 150 / len(values))
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if opened and not opened[layer][head]:  # a cross with an outline
                axes.plot(layer, head, "x", color="white", markersize=size + 1, markeredgewidth=3)
                axes.plot(layer, head, "x", color=plots.INK, markersize=size, markeredgewidth=1.2)
            elif len(values) <= MAX_LAYERS_WITH_NUMBERS:
                colour = "white" if value < 0.55 * top else plots.INK
                axes.text(layer, head, f"{value:.2f}", ha="center", va="center", color=colour)
    return image


def _squares(kv: KV) -> Tensor:
    """``(2, L, H)``: sums of squares of keys and values over tokens and dimensions."""
    return torch.stack([part.double().square().sum((1, 3, 4)).cpu() for part in (kv.key, kv.value)])


def _mean(values: list[list[float]]) -> float:
    return float(torch.tensor(values).mean())
