"""Is a fused cache richer than the receiver's own? The effective rank of keys and values, layer by layer.

As in the paper's table 2 and figure 12. A layer's keys of all prompt tokens, heads side by side and as the cache holds them, are one
matrix ``(tokens, H * D)``; its effective rank says over how many directions its singular values are spread.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.fusers.groups import to_groups
from kvfuse.support.plots import COLOURS, MARKERS, count_whole, legend_above, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvfuse.model import CacheToCache
    from kvfuse.prompts.alignment import AlignedPrompt

PARTS = {"keys": "key", "values": "value"}


def effective_rank(singular_values: Tensor) -> Tensor:
    """The exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli 2007, EUSIPCO, definition 1).

    Args:
        singular_values: ``(..., n)``, none below zero, in any order.

    Returns:
        ``(...)``, from 1 for one direction to ``n`` for n equal ones; of nothing but zeros, 0.
    """
    total = singular_values.sum(-1, keepdim=True)
    shares = singular_values / total.clamp(min=torch.finfo(singular_values.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def run(study: Study) -> Finding:
    """Read all questions with every model, fuse, and compare the caches.

    Args:
        study: A pair with prompts; answers are not needed.
    """
    grams: dict[str, Gram] = {}
    with torch.no_grad():
        for prompt in study.prompts():
            for name, (kv, mask) in caches(study.pair, prompt).items():
                grams.setdefault(name, Gram()).add(kv, mask)
    found = {name: gram.to_dict() for name, gram in grams.items()}
    return Finding({"questions": len(study.questions), "caches": found}, reading(found), lambda: draw(found))


def caches(pair: "CacheToCache", prompt: "AlignedPrompt") -> dict[str, tuple[KV, Tensor]]:
    """What each model's cache of a batch holds, and the fused one, each with the mask ``(B, T)`` of what is not padding."""
    streams = pair.read(prompt)
    receiver, sharers = read_cache(streams.receiver), [read_cache(one) for one in streams.sharers]
    fused, mask = pair.fuse_kv(prompt=prompt, receiver=receiver, sharers=sharers), prompt.mask[:, :-1]
    names = ["sharer"] if len(sharers) == 1 else [f"sharer {place}" for place in range(len(sharers))]
    read = {name: (kv, reads.mask) for name, kv, reads in zip(names, sharers, prompt.sharers, strict=True)}
    return {"receiver": (receiver, mask), "fused": (fused, mask), **read}


class Gram:
    """Products of all dimensions of keys, and of values, summed over tokens: the squares of the singular values are in them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.products: dict[str, Tensor] = {}  # (L, C, C) float64

    def add(self, kv: KV, mask: Tensor) -> None:
        """Add the tokens of a batch that are not padding, ``(B, T)`` mask."""
        self.tokens += int(mask.sum())
        for name, part in PARTS.items():
            x = to_groups(kv, parts=(part,)).double()[:, mask.flatten().bool().to(kv.key.device)]  # (L, N, C)
            products = (x.transpose(1, 2) @ x).cpu()
            self.products[name] = self.products[name] + products if name in self.products else products

    def to_dict(self) -> dict[str, Any]:
        """Effective ranks by layer and their mean, beside what they can be at most: tokens and dimensions."""
        out: dict[str, Any] = {"tokens": self.tokens}
        for name, products in self.products.items():
            ranks = effective_rank(torch.linalg.eigvalsh(products).clamp(min=0).sqrt())
            out[name] = {"dimensions": products.shape[-1], "mean": float(ranks.mean()), "layers": ranks.tolist()}
        return out


def reading(caches: Mapping[str, Any]) -> str:
    """Two sentences: what fusing does, and where the sharer stands."""
    own, fused, sharer = (
        caches["receiver"],
        caches["fused"],
        next(one for name, one in caches.items() if name.startswith("sharer")),
    )
    changes = ", ".join(
        f"of {name} from {own[name]['mean']:.1f} to {fused[name]['mean']:.1f} (of {own[name]['dimensions']})"
        for name in PARTS
    )
    theirs = ", ".join(f"{sharer[name]['mean']:.1f} in {name} (of {sharer[name]['dimensions']})" for name in PARTS)
    return f"Over {own['tokens']:,} tokens, fusing takes the effective rank, averaged over layers, {changes}. The sharer's is {theirs}."


@styled
def draw(caches: Mapping[str, Any]) -> "Figure":
    """Effective rank by layer, keys and values beside each other; dashed: the mean over layers."""
    figure, panels = new_panels(3.6, 2, sharey=True)
    shown: list[Any] = []
    for axes, name in zip(panels, PARTS, strict=True):
        for (whose, one), colour, marker in zip(caches.items(), COLOURS, MARKERS, strict=False):
            label = f"{whose}, {one[name]['dimensions']} dimensions"
            line = axes.plot(one[name]["layers"], marker=marker, color=colour, label=label, markersize=5)
            axes.axhline(one[name]["mean"], color=colour, linewidth=1, linestyle=(0, (4, 3)))
            shown += line if name == "keys" else []
        axes.set_title(name, loc="left", fontsize=10, weight="bold")
        axes.set(xlabel="layer of the model (0 = first)", ylim=(0, None))
        count_whole(axes.xaxis)
    panels[0].set_ylabel("effective rank (directions), dashed: mean")
    legend_above(figure, shown)
    return figure
