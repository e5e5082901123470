"""Is a fused cache richer than the receiver's own? The effective rank of keys and values, layer by layer.

As in the paper's table 2 and figure 12. A layer's keys of all prompt tokens, as the cache holds them and heads side by
side, form one matrix ``(tokens, H * D)``; its effective rank is the number of directions over which its singular values
are spread.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ReadBatch, read_batches
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.fusers.groups import to_groups
from kvfuse.support import plots

PARTS = {"keys": "key", "values": "value"}
"""Name in the figures -> attribute of :class:`kvfuse.cache.transformers_cache.KV`."""


def effective_rank(singular_values: Tensor) -> Tensor:
    """The exponential of the entropy of the singular values as shares of their sum.

    Roy and Vetterli 2007, EUSIPCO, definition 1.

    Args:
        singular_values: ``(..., n)``, none below zero, in any order.

    Returns:
        ``(...)``: between 1 for a single direction and ``n`` for n equal ones; 0 where all are zero.
    """
    total = singular_values.sum(-1, keepdim=True)
    # the entropy of no direction at all is undefined: such a matrix has rank 0
    shares = singular_values / total.clamp(min=torch.finfo(singular_values.dtype).tiny)
    return torch.where(total.squeeze(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0.0)


def run(study: Study) -> Finding:
    """Read all questions with every model, fuse, and compare the caches.

    Args:
        study: A pair with prompts; answers are not needed.
    """
    grams: dict[str, Gram] = {}
    with torch.no_grad():
        for batch in read_batches(study):
            for name, (kv, mask) in caches(batch).items():
                grams.setdefault(name, Gram()).add(kv, mask)
    ranks = {name: gram.to_dict() for name, gram in grams.items()}
    return Finding({"questions": len(study.questions), "caches": ranks}, reading(ranks), lambda: draw(ranks))


def caches(batch: ReadBatch) -> dict[str, tuple[KV, Tensor]]:
    """Every cache of a batch by name, with its mask ``(B, T)`` of tokens that are not padding."""
    # the receiver's caches leave the last prompt token out, the sharers' do not
    mask, count = batch.prompt.mask[:, :-1], len(batch.sharers)
    names = ["sharer"] if count == 1 else [f"sharer {index}" for index in range(count)]
    sharers = {
        name: (kv, reads.mask) for name, kv, reads in zip(names, batch.sharers, batch.prompt.sharers, strict=True)
    }
    return {"receiver": (batch.clean, mask), "fused": (batch.fused, mask), **sharers}


class Gram:
    """Gram matrices of keys and of values, summed over tokens: their eigenvalues are the squared singular values."""

    def __init__(self) -> None:
        self.tokens = 0
        self.products: dict[str, Tensor] = {}  # (L, C, C) float64

    def add(self, kv: KV, mask: Tensor) -> None:
        """Add the tokens of a batch that ``mask`` ``(B, T)`` does not mark as padding."""
        self.tokens += int(mask.sum())
        # C x C products instead of all tokens: they add up over batches
        for name, part in PARTS.items():
            x = to_groups(kv, parts=(part,)).double()[:, mask.flatten().bool().to(kv.key.device)]  # (L, N, C)
            products = (x.transpose(1, 2) @ x).cpu()  # (L, C, C)
            self.products[name] = self.products[name] + products if name in self.products else products

    def to_dict(self) -> dict[str, Any]:
        """Effective ranks by layer and their mean, with their upper bounds: numbers of tokens and of dimensions."""
        figures: dict[str, Any] = {"tokens": self.tokens}
        for name, products in self.products.items():
            ranks = effective_rank(torch.linalg.eigvalsh(products).clamp(min=0).sqrt())  # (L,)
            figures[name] = {"dimensions": products.shape[-1], "mean": float(ranks.mean()), "layers": ranks.tolist()}
        return figures


def reading(caches: Mapping[str, Any]) -> str:
    """Two sentences: what fusing changes, and the rank of the (first) sharer's cache."""
    own, fused = caches["receiver"], caches["fused"]
    sharer = next(cache for name, cache in caches.items() if name.startswith("sharer"))
    changes = ", ".join(
        f"of {name} from {own[name]['mean']:.1f} to {fused[name]['mean']:.1f} (of {own[name]['dimensions']})"
        for name in PARTS
    )
    ranks = ", ".join(f"{sharer[name]['mean']:.1f} in {name} (of {sharer[name]['dimensions']})" for name in PARTS)
    return (
        f"Over {own['tokens']:,} tokens, fusing takes the effective rank, averaged over layers, {changes}. "
        f"The sharer's is {ranks}."
    )


@plots.styled
def draw(caches: Mapping[str, Any]) -> plots.Figure:
    """Effective rank by layer, keys and values side by side; dashed: the mean over layers."""
    figure, panels = plots.new_panels(3.6, 2, sharey=True)
    handles: list[Any] = []
    for axes, name in zip(panels, PARTS, strict=True):
        ranks = {f"{cache}, {found[name]['dimensions']} dimensions": found[name] for cache, found in caches.items()}
        lines = plots.draw_lines(axes, {label: found["layers"] for label, found in ranks.items()})
        for line, found in zip(lines, ranks.values(), strict=True):
            axes.axhline(found["mean"], color=line.get_color(), linewidth=1, linestyle=plots.DASHED)
        handles = handles or lines
        axes.set_title(name, fontsize=10, weight="bold")
        axes.set(xlabel="layer of the model (0 = first)", ylim=(0, None))
        plots.count_whole(axes.xaxis)
    panels[0].set_ylabel("effective rank (directions), dashed: mean")
    plots.legend_above(figure, handles)
    return figure
