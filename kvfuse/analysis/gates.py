"""Which layers and heads does the fuser open, and how much weight does it give them?

Over a data set, as in the paper's A.4.2: gates as they are at inference, the mean weight of each head over all fused tokens, and
beside it what the two come to, the size of what is added relative to what it is added to.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.hooks import Note, watching
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.fusers import Fuser
from kvfuse.fusers.groups import PARTS
from kvfuse.fusers.layers import HeadWeights
from kvfuse.support.plots import INK, count_whole, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"key": "keys", "value": "values"}
CROSSED = " (crossed out: gate closed)"
WRITTEN = 12
"""Figures are written into the cells of a map of so many layers at most."""


def run(study: Study) -> Finding:
    """Read all questions and watch the fusers.

    Args:
        study: A pair with prompts; answers are not needed.

    Raises:
        AnalysisError: Nothing is fused.
    """
    seen = [Seen(fuser) for fuser in study.pair.fusers]
    with torch.no_grad(), watching({module: note for one in seen for module, note in one.notes().items()}):
        for prompt in study.prompts():
            study.pair.prefill(prompt)
    if not all(one.tokens for one in seen):
        raise AnalysisError("expected prompts of which something is fused, got none; use longer ones")
    figures = {"questions": len(study.questions), "sharers": [one.to_dict() for one in seen]}
    return Finding(figures, reading(figures), lambda: draw(figures))


class Seen:
    """What a fuser did, summed over tokens.

    Args:
        fuser: The one to watch; any kind, with gates and weights or without.
    """

    def __init__(self, fuser: Fuser) -> None:
        self.fuser = fuser
        self.tokens = 0
        self.weights: Tensor | None = None
        self.added, self.own = torch.zeros(()), torch.zeros(())  # then (2, L, H)

    def notes(self) -> dict[Any, Note]:
        """What to watch, and who is told."""
        weights: dict[Any, Note] = {
            module: self._weigh for module in self.fuser.modules() if isinstance(module, HeadWeights)
        }
        return {self.fuser: self._compare, **weights}

    def to_dict(self) -> dict[str, Any]:
        """By ``keys`` and ``values``, lists of layers, within them of heads: ``open``, ``weight`` and ``relative_size``."""
        gates = self.fuser.open_gates()
        size = (self.added / self.own).sqrt()
        out: dict[str, Any] = {
            "tokens": self.tokens,
            "gates": {name: opened.tolist() for name, opened in gates.items()},
        }
        for place, (part, name) in enumerate(NAMES.items()):
            weight = self._weights_of(part)
            opened = gates.get(name, gates.get("layers"))
            out[name] = {
                "open": None if opened is None else opened.reshape(len(opened), -1).expand_as(size[place]).tolist(),
                "weight": None if weight is None else weight.tolist(),
                "relative_size": size[place].tolist(),
            }
        return out

    def _weights_of(self, part: str) -> Tensor | None:
        """``(L, H)``: mean weights of the keys' or the values' heads; None where they have none."""
        if self.weights is None:
            return None
        layers = self.fuser.config.receiver_kv.num_layers
        parts = PARTS if len(self.weights) > layers else tuple(getattr(self.fuser, "parts", PARTS))
        means = dict(zip(parts, (self.weights / self.tokens).split(layers), strict=True))
        return means.get(part)

    def _weigh(self, _: tuple[Any, ...], weights: Tensor) -> None:
        summed = weights.double().sum(dim=1).cpu()  # (G, H)
        self.weights = summed if self.weights is None else self.weights + summed

    def _compare(self, inputs: dict[str, KV], residual: KV) -> None:
        self.tokens += residual.key.shape[1] * residual.key.shape[3]
        self.added, self.own = self.added + _squares(residual), self.own + _squares(inputs["receiver"])


def reading(figures: dict[str, Any]) -> str:
    """Two sentences on the first sharer's fuser."""
    one = figures["sharers"][0]
    flags = [flag for name in NAMES.values() for layer in one[name]["open"] or [] for flag in layer]
    opened = f"{100 * sum(flags) / len(flags):.0f}% of the heads' gates are open" if flags else "The fuser has no gates"
    sizes = ", ".join(f"{_mean(one[name]['relative_size']):.2f} of the receiver's {name}" for name in NAMES.values())
    weights = [f"{name} {_mean(one[name]['weight']):.2f}" for name in NAMES.values() if one[name]["weight"]]
    weighed = f"The mean weight of a head is for {', for '.join(weights)}; " if weights else ""
    return f"Over {one['tokens']:,} tokens: {opened}. {weighed}{'w' if weighed else 'W'}hat is added measures on average {sizes}."


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """Maps of layers by heads: weights above, sizes below, closed gates crossed out; one pair of rows a sharer."""
    shown = [
        (one, kind)
        for one in figures["sharers"]
        for kind in ("weight", "relative_size")
        if any(one[name][kind] for name in NAMES.values())
    ]
    heads = len(figures["sharers"][0]["keys"]["relative_size"][0])
    figure, panels = new_panels(len(shown) * (1.75 + 0.17 * heads), 2, len(shown))
    for row, (one, kind) in enumerate(shown):
        top = 1.0 if kind == "weight" else max(max(map(max, one[name][kind])) for name in NAMES.values())
        pair = panels[2 * row : 2 * row + 2]
        images = [
            _map(axes, one[name][kind], one[name]["open"], top) for axes, name in zip(pair, NAMES.values(), strict=True)
        ]
        label = "mean weight (0 to 1)" if kind == "weight" else "size of what is added\n/ of the receiver's own"
        figure.colorbar(next(image for image in images if image), ax=pair, label=label, pad=0.02)
        for axes, name in zip(pair, NAMES.values(), strict=True):
            axes.set_title(name + CROSSED * _any_closed(one[name]["open"]), loc="left", fontsize=10, weight="bold")
    return figure


def _map(axes: "Axes", values: list[list[float]] | None, opened: list[list[bool]] | None, top: float) -> Any:
    """Layers from left to right, heads from above."""
    axes.set(xlabel="receiver layer", ylabel="KV head")
    if values is None:
        axes.text(0.5, 0.5, "no weights", ha="center", va="center", transform=axes.transAxes)
        return None
    grid = torch.tensor(values).T.numpy()
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=top or 1, aspect="auto")
    count_whole(axes.xaxis)
    count_whole(axes.yaxis)
    size = min(13, 150 / len(values))
    for layer, row in enumerate(values):
        for head, value in enumerate(row):
            if opened and not opened[layer][head]:
                axes.plot(layer, head, "x", color="white", markersize=size + 1, markeredgewidth=3)
                axes.plot(layer, head, "x", color=INK, markersize=size, markeredgewidth=1.2)
            elif len(values) <= WRITTEN:
                axes.text(
                    layer, head, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.55 * top else INK
                )
    return image


def _any_closed(opened: list[list[bool]] | None) -> bool:
    return opened is not None and not all(map(all, opened))


def _squares(kv: KV) -> Tensor:
    """``(2, L, H)``: sums of squares over tokens and dimensions."""
    return torch.stack([part.double().square().sum((1, 3, 4)).cpu() for part in (kv.key, kv.value)])


def _mean(values: list[list[float]]) -> float:
    return float(torch.tensor(values).mean())
