"""What does the receiver's first answer token attend to, with and without fusing?

The last prompt token's run decides the first answer token. Its attention weights, which sum to one over the prompt, are averaged
over heads and questions and summed by what they fall on: words of the messages, the template around them, the last token itself.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ROLES, Read, batches, eager, first_run, padded_roles, read, spread, told
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.support.plots import COLOURS, INK, legend_above, name_lines, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WAYS = ("alone", "fused")


def run(study: Study, questions: int = 96) -> Finding:
    """Watch the attention of the last prompt token.

    Args:
        study: A pair with prompts; answers are not needed.
        questions: How many of them to read.

    Raises:
        AnalysisError: The receiver does not tell its attention weights.
    """
    model, asked = study.pair.receiver.model, spread(study, questions)
    sums, moved, example = [], [], None
    with torch.no_grad(), eager(model):
        for batch in batches(asked, study.batch_size):
            seen = read(study.pair, batch)
            both = [attended(study, seen, kv) for kv in (seen.own, seen.fused)]  # (L, B, T) each
            falls = torch.stack(
                [padded_roles(seen.readings) == role for role in range(len(ROLES))]
            ).float()  # (roles, B, T)
            sums.append(torch.stack([torch.einsum("lbt,rbt->lrb", one, falls) for one in both]))  # (ways, L, roles, B)
            moved.append((both[0] - both[1]).abs().sum(-1) / 2)  # (L, B)
            example = example or _example(study, seen, both)
    shares, distance = torch.cat(sums, -1).mean(-1), torch.cat(moved, -1).mean(-1)
    layers = [
        {way: dict(zip(ROLES, shares[i, layer].tolist(), strict=True)) for i, way in enumerate(WAYS)}
        | {"moved": distance[layer].item()}
        for layer in range(len(distance))
    ]
    figures = {"questions": len(asked), "layers": layers, "example": example}
    return Finding(figures, reading(figures), lambda: draw(figures))


def attended(study: Study, seen: Read, kv: KV) -> Tensor:
    """``(L, B, T)``: the last token's attention over the prompt, averaged over heads, of the layers that attend."""
    weights = first_run(study.pair.receiver.model, seen, kv, output_attentions=True).attentions
    weights = [one for one in weights or () if one is not None]
    if not weights:
        raise AnalysisError(
            f"expected a receiver that tells its attention weights, got {study.pair.receiver.name}; use another"
        )
    return torch.stack([one[:, :, -1, -seen.prompt.ids.shape[1] :].float().mean(1).cpu() for one in weights])


def reading(figures: dict[str, Any]) -> str:
    """Two sentences."""
    layers = figures["layers"]
    most = max(range(len(layers)), key=lambda layer: layers[layer]["moved"])
    words = [sum(one[way]["message"] for one in layers) / len(layers) for way in WAYS]
    return (
        f"Over {figures['questions']} questions and all layers, {100 * words[0]:.0f}% of the last token's attention falls on words of the "
        f"messages when the receiver is alone and {100 * words[1]:.0f}% when its cache is fused. Layer {most} changes most: "
        f"{100 * layers[most]['moved']:.0f}% of its attention goes elsewhere."
    )


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """Above, what each layer attends to, alone and fused; below, token by token in one prompt."""
    layers, example = figures["layers"], figures["example"]
    rows = [(layer, way) for layer in range(len(layers)) for way in WAYS]
    figure, (bars, grid) = new_panels(2.6 + 0.5 * len(rows), rows=2)
    shown, left = [], [0.0] * len(rows)
    for role, colour in zip(ROLES, COLOURS, strict=False):
        widths = [100 * layers[layer][way][role] for layer, way in rows]
        shown.append(bars.barh(range(len(rows)), widths, 0.72, left, color=colour, label=role))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    names = [f"layer {layer}, {way}" for layer, way in rows]
    name_lines(bars, names)
    bars.set(xlim=(0, 100), xlabel="attention of the last prompt token (%), mean over heads and questions")
    legend_above(figure, shown)
    image = grid.imshow(
        [[100 * share for share in example[way][layer]] for layer, way in rows], cmap="cividis", aspect="auto", vmin=0
    )
    grid.set_yticks(range(len(rows)), names)
    grid.set_xticks(
        range(len(example["tokens"])), example["tokens"], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
    )
    grid.set_xlabel("tokens of one prompt, in order (· space, ⏎ line break)")
    figure.colorbar(image, ax=grid, label="attention (%)", pad=0.01)
    for line in range(1, len(layers)):
        bars.axhline(2 * line - 0.5, color=INK, linewidth=0.4)
        grid.axhline(2 * line - 0.5, color="white", linewidth=1.5)
    return figure


def _example(study: Study, seen: Read, both: list[Tensor]) -> dict[str, Any]:
    """The first prompt of a batch, token by token."""
    first = seen.readings[0].receiver
    weights = {way: one[:, 0, -len(first.ids) :].tolist() for way, one in zip(WAYS, both, strict=True)}
    return {"tokens": told(first, study.pair.receiver.tokenizer), **weights}
