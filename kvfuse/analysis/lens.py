"""What does the fused cache make the receiver want to say, position by position and layer by layer?

A residual depends on its own position alone, so any set of positions can be fused: one after the other from the left or from the
right, or all but one. By layer, the last token's hidden state is read as if it were the last one, through the final norm and the
vocabulary head (the logit lens: nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ROLES, Read, answer_ids, first_run, mix, read, roles, show, spread, told
from kvfuse.analysis.study import Question, Study
from kvfuse.errors import AnalysisError
from kvfuse.support.plots import COLOURS, INK, MARKERS, legend_above, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = tuple(np.linspace(0, 1, 11).tolist())
ORDERS = ("from the left", "from the right")


def run(study: Study, questions: int = 60) -> Finding:
    """Fuse positions one by one and ask for the first answer token each time.

    Args:
        study: A pair with prompts; where a question has an answer, its first token is what is looked for, else what the fused
            receiver says first.
        questions: How many of them to read.
    """
    asked = spread(study, questions)
    looks = [look(study, one) for one in asked]
    layers = {way: np.mean([one["layers"][way] for one in looks], axis=0).tolist() for way in ("alone", "fused")}
    reached = {order: np.mean([_at_shares(one[order]) for one in looks], axis=0).tolist() for order in ORDERS}
    example = max(looks, key=lambda one: one["layers"]["fused"][-1] - one["layers"]["alone"][-1])
    figures = {
        "questions": len(asked),
        "layers": layers,
        "share_fused": list(SHARES),
        "probability": reached,
        "most_needed": most_needed(looks),
        "example": example,
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


@torch.no_grad()
def look(study: Study, question: Question) -> dict[str, Any]:
    """Everything about one prompt: probabilities of the looked-for token, by position (of those fused) and by layer."""
    pair = study.pair
    seen = read(pair, [question])
    model, tokenizer = pair.receiver.model, pair.receiver.tokenizer
    (wanted,) = answer_ids(pair, seen, [question]).tolist()
    fused = seen.fused_positions[0].nonzero()[:, 0]
    if not len(fused):
        raise AnalysisError(
            "expected prompts with a position that is fused, got one without; use another fuser or other data"
        )
    logits = (
        first_run(model, seen, mix(seen.own, seen.fused, _variants(seen, fused)[None, :, None, :, None]))
        .logits[:, -1]
        .float()
    )
    chances = logits.softmax(-1)[:, wanted].tolist()
    steps = len(fused) + 1
    mine = seen.readings[0].receiver
    return {
        "wanted": show(tokenizer.decode([wanted])),
        "tokens": [told(mine, tokenizer)[place] for place in fused.tolist()],
        "roles": [ROLES[roles(mine)[place]] for place in fused.tolist()],
        ORDERS[0]: chances[:steps],
        ORDERS[1]: chances[steps : 2 * steps],
        "lost": [chances[steps - 1] - chance for chance in chances[2 * steps :]],
        "says": [show(tokenizer.decode([token])) for token in logits[:steps].argmax(-1).tolist()],
        "layers": {way: by_layer(model, seen, kv, wanted) for way, kv in (("alone", seen.own), ("fused", seen.fused))},
    }


def by_layer(model: PreTrainedModel, seen: Read, kv: Any, wanted: int) -> list[float]:
    """The probability of a token as the logit lens reads it, of the embedding, then of each layer's output.

    What a family does to its logits behind the head (a cap, a scale) is done to the last layer's alone.
    """
    out = first_run(model, seen, kv, output_hidden_states=True)
    norm, head = final_norm(model), model.get_output_embeddings()
    states = [head(norm(state[:, -1])) for state in out.hidden_states[:-1]]  # the last one is normed already
    return [float(logits.float().softmax(-1)[0, wanted]) for logits in [*states, out.logits[:, -1]]]


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm in front of the vocabulary head. Raises AnalysisError where there is none."""
    norms = [child for child in model.base_model.children() if "Norm" in type(child).__name__]
    if not norms:
        raise AnalysisError(f"expected a receiver with a norm before its head, got {type(model).__name__}; use another")
    return norms[-1]


def most_needed(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The token that is most often the one whose position is missed most, in which share of prompts, and what such a position is worth."""
    places = [int(np.argmax(one["lost"])) for one in looks]
    ((token, count),) = Counter(one["tokens"][place] for one, place in zip(looks, places, strict=True)).most_common(1)
    return {"token": token, "share": count / len(looks), "lost": float(np.mean([max(one["lost"]) for one in looks]))}


def reading(figures: dict[str, Any]) -> str:
    """Two sentences."""
    alone, fused = (figures["layers"][way][-1] for way in ("alone", "fused"))
    half = {order: _half(figures, order) for order in ORDERS}
    needed = figures["most_needed"]
    return (
        f"The right first token has a mean probability of {alone:.2f} alone and {fused:.2f} fused over {figures['questions']} questions; "
        f"half of that way is made once {half[ORDERS[0]]} of the positions are fused from the left, or {half[ORDERS[1]]} from the right. "
        f"The one position that is missed most is {needed['token']!r} in {100 * needed['share']:.0f}% of the prompts; unfusing it alone "
        f"costs {needed['lost']:.2f} on average."
    )


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """From above: one prompt as it is fused, what each of its positions is worth, and all questions by share and by layer."""
    figure, (path, worth, share, layer) = _panels()
    legend_above(figure, _draw_path(path, figures["example"]))
    _draw_worth(worth, figures["example"])
    for order, colour, marker in zip(ORDERS, COLOURS, MARKERS, strict=False):
        percent = [100 * one for one in figures["share_fused"]]
        share.plot(percent, figures["probability"][order], marker=marker, color=colour, markersize=5)
    share.set(xlabel="positions fused (%)", ylabel="probability of the right\nfirst token (0 to 1)", ylim=(0, 1))
    for way, colour, marker in zip(("alone", "fused"), COLOURS[2:], MARKERS[2:], strict=False):
        layer.plot(figures["layers"][way], marker=marker, color=colour, label=way, markersize=5)
    layer.set(xlabel="after layer (0: embedding), logit lens", ylim=(0, 1))
    layer.locator_params(axis="x", integer=True)
    layer.legend()
    for axes in (share, layer):
        axes.set_title(f"mean over {figures['questions']} questions", loc="left", fontsize=9)
    return figure


def _panels() -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 8.4), layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["path", "path"], ["worth", "worth"], ["share", "layer"]], height_ratios=[1.2, 1, 1]
    )
    return figure, [panels[name] for name in ("path", "worth", "share", "layer")]


def _draw_path(axes: "Axes", example: dict[str, Any]) -> Sequence[Any]:
    shown: list[Any] = []
    for order, colour, marker in zip(ORDERS, COLOURS, MARKERS, strict=False):
        chances = example[order] if order == ORDERS[0] else example[order][::-1]
        places = range(len(chances)) if order == ORDERS[0] else range(1, len(chances) + 1)
        shown += axes.plot(
            list(places), chances, marker=marker, color=colour, label=f"fused {order} up to here", markersize=4
        )
    said = example["says"]
    for place in (i for i in range(len(said)) if i == 0 or said[i] != said[i - 1]):
        axes.text(place, 1.06, said[place], rotation=45, ha="left", va="bottom", fontsize=8)
    axes.set(ylabel=f"probability of\n{example['wanted']!r} (0 to 1)", ylim=(0, 1.04), xlim=(-0.5, len(said) - 0.2))
    axes.set_title(
        "one prompt; above: what is likeliest when fused from the left up to there", loc="left", fontsize=9, pad=34
    )
    axes.set_xticks(
        range(len(said)), ["(none)", *example["tokens"]], rotation=60, ha="right", rotation_mode="anchor", fontsize=8
    )
    return shown


def _draw_worth(axes: "Axes", example: dict[str, Any]) -> None:
    places = range(1, len(example["lost"]) + 1)
    axes.bar(
        list(places),
        example["lost"],
        color=[COLOURS[3] if role == "message" else COLOURS[7] for role in example["roles"]],
    )
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set(ylabel="probability lost\nwithout this position", xlim=(-0.5, len(places) + 0.8))
    axes.set_title("the same prompt: words of the message in pink, template in grey", loc="left", fontsize=9)
    axes.set_xticks(list(places), example["tokens"], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)


def _variants(seen: Read, fused: Tensor) -> Tensor:
    """``(2 (n + 1) + n, T - 1)`` bool: the first k fused, the last k, all but one."""
    count = len(fused)
    first = torch.ones(count + 1, count).tril(-1)
    chosen = torch.cat([first, first.flip(1), 1 - torch.eye(count)]).bool()
    places = torch.zeros(len(chosen), seen.own.key.shape[3], dtype=torch.bool)
    places[:, fused] = chosen
    return places.to(seen.own.key.device)


def _at_shares(chances: Sequence[float]) -> np.ndarray:
    return np.interp(SHARES, np.linspace(0, 1, len(chances)), chances)


def _half(figures: dict[str, Any], order: str) -> str:
    chances = figures["probability"][order]
    middle = (chances[0] + chances[-1]) / 2
    rises = chances[-1] >= chances[0]
    share = next(
        share for share, chance in zip(SHARES, chances, strict=True) if (chance >= middle) == rises or share == 1
    )
    return f"{100 * share:.0f}%"
