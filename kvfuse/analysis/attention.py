"""What does the receiver's first answer token attend to, with and without fusing?

The run over the last prompt token decides the first answer token. Its attention weights, which sum to one over the
prompt, are averaged over heads and questions, and summed by role: words of the messages, the template around them, the
last token itself.
"""

from typing import Any

import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ROLES, WAYS, ReadBatch, eager_attention, padded_roles, read_batches, token_texts
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.support import plots


def run(study: Study, questions: int = 96) -> Finding:
    """Record the attention of the last prompt token.

    Args:
        study: A pair with prompts; answers are not needed.
        questions: Number of prompts to read.

    Raises:
        AnalysisError: The receiver does not return its attention weights.
    """
    asked = study.spread(questions)
    shares, moved, example = [], [], None
    with torch.no_grad(), eager_attention(study.pair.receiver.model):
        for batch in read_batches(asked):
            # 1) Read the last token's attention from the clean and from the fused cache.
            weights = torch.stack([attention_weights(batch, kv) for kv in (batch.clean, batch.fused)])  # (2, L, B, T)
            # 2) Sum it by role of the tokens attended to.
            padded = padded_roles(batch.rows)
            is_role = torch.stack([padded == role for role in range(len(ROLES))]).float()  # (roles, B, T)
            shares.append(torch.einsum("wlbt,rbt->wlrb", weights, is_role))
            # 3) Total variation distance: the attention that fusing moves elsewhere.
            moved.append((weights[0] - weights[1]).abs().sum(-1) / 2)  # (L, B)
            example = example or _example(batch, weights)
    mean_shares, distance = torch.cat(shares, -1).mean(-1), torch.cat(moved, -1).mean(-1)  # (2, L, roles), (L,)
    layers = [
        {way: dict(zip(ROLES, mean_shares[i, layer].tolist(), strict=True)) for i, way in enumerate(WAYS)}
        | {"moved": distance[layer].item()}
        for layer in range(len(distance))
    ]
    figures = {"questions": len(asked.questions), "layers": layers, "example": example}
    return Finding(figures, reading(figures), lambda: draw(figures))


def attention_weights(batch: ReadBatch, kv: KV) -> Tensor:
    """``(L, B, T)``: the last token's attention over the prompt, averaged over heads, in the layers that attend."""
    weights = batch.run_last_token(kv, output_attentions=True).attentions  # (B, H, 1, T) per layer
    weights = [layer for layer in weights or () if layer is not None]
    if not weights:
        name = batch.pair.receiver.name
        raise AnalysisError(f"expected a receiver that returns its attention weights, got {name}; use another")
    tokens = batch.prompt.ids.shape[1]
    return torch.stack([layer[:, :, -1, -tokens:].float().mean(1).cpu() for layer in weights])


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: attention to the messages, and the layer that changes most."""
    layers = figures["layers"]
    most = max(range(len(layers)), key=lambda layer: layers[layer]["moved"])
    alone, fused = (100 * sum(layer[way]["message"] for layer in layers) / len(layers) for way in WAYS)
    return (
        f"Over {figures['questions']} questions and all layers, {alone:.0f}% of the last token's attention falls on "
        f"words of the messages when the receiver is alone and {fused:.0f}% when its cache is fused. Layer {most} "
        f"changes most: {100 * layers[most]['moved']:.0f}% of its attention goes elsewhere."
    )


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """Above, attention by role in each layer, alone and fused; below, token by token in one prompt."""
    layers, example = figures["layers"], figures["example"]
    lines = [(layer, way) for layer in range(len(layers)) for way in WAYS]
    names = [f"layer {layer}, {way}" for layer, way in lines]
    figure, (bars, grid) = plots.new_panels(2.6 + 0.5 * len(lines), rows=2)
    # 1) Bars by role.
    shares = {role: [100 * layers[layer][way][role] for layer, way in lines] for role in ROLES}
    plots.legend_above(figure, plots.stack_bars(bars, shares, 0.72))
    plots.name_lines(bars, names)
    bars.set(xlim=(0, 100), xlabel="attention of the last prompt token (%), mean over heads and questions")
    # 2) The example as a map of lines by tokens.
    percent = [[100 * share for share in example[way][layer]] for layer, way in lines]
    image = grid.imshow(percent, cmap="cividis", aspect="auto", vmin=0)
    grid.set_yticks(range(len(lines)), names)
    plots.name_columns(grid, example["tokens"])
    grid.set_xlabel("tokens of one prompt, in order (· space, ⏎ line break)")
    figure.colorbar(image, ax=grid, label="attention (%)", pad=0.01)
    # 3) A line between layers.
    for layer in range(1, len(layers)):
        bars.axhline(2 * layer - 0.5, color=plots.INK, linewidth=0.4)
        grid.axhline(2 * layer - 0.5, color="white", linewidth=1.5)
    return figure


def _example(batch: ReadBatch, weights: Tensor) -> dict[str, Any]:
    """The first prompt of a batch, token by token, with ``weights`` ``(2, L, B, T)``."""
    first = batch.rows[0].receiver
    attention = {way: part[:, 0, -len(first.ids) :].tolist() for way, part in zip(WAYS, weights, strict=True)}
    return {"tokens": token_texts(first, batch.pair.receiver.tokenizer), **attention}
