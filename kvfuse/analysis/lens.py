"""What does the fused cache make the receiver want to say, position by position and layer by layer?

The residual of a position depends on that position alone, so any set of positions can be fused: the first ones, the
last ones, or all but one. By layer, the last token's hidden state is read through the final norm and the vocabulary
head, as if it were the last layer's (the logit lens: nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ROLES, WAYS, ReadBatch, read, roles, token_texts, visible
from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.model import CacheToCache
from kvfuse.prompts.response import tokenize_response
from kvfuse.support import plots

SHARES = tuple(np.linspace(0, 1, 11).tolist())
ORDERS = ("from the left", "from the right")


def run(study: Study, questions: int = 60) -> Finding:
    """Fuse positions one by one and read the first answer token each time.

    Args:
        study: A pair with prompts. The token looked for is the first of the right answer; for a question without an
            answer, the fused receiver's own first token.
        questions: Number of prompts to read.
    """
    asked = study.spread(questions).questions
    looks = [look(study.pair, question) for question in asked]
    gains = [found["layers"]["fused"][-1] - found["layers"]["alone"][-1] for found in looks]
    figures = {
        "questions": len(asked),
        "layers": {way: np.mean([found["layers"][way] for found in looks], axis=0).tolist() for way in WAYS},
        "share_fused": list(SHARES),
        "probability": {
            order: np.mean([_at_shares(found[order]) for found in looks], axis=0).tolist() for order in ORDERS
        },
        "most_needed": most_needed(looks),
        "example": looks[int(np.argmax(gains))],
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


@torch.no_grad()
def look(pair: CacheToCache, question: Question) -> dict[str, Any]:
    """Returns the probabilities of the wanted token for one prompt, by fused positions and by layer."""
    batch, tokenizer = read(pair, [question]), pair.receiver.tokenizer
    wanted = _wanted(batch)
    fused = batch.fused_positions[0].nonzero()[:, 0]  # (n,)
    if not len(fused):
        raise AnalysisError(
            "expected prompts with a position that is fused, got one without; use another fuser or other data"
        )
    # 1) All variants of the cache at once, as the rows of one run.
    variants = batch.mix(batch.fused, _variants(batch, fused)[None, :, None, :, None])
    logits = batch.first_logits(variants)  # (variants, V)
    chances = logits.softmax(-1)[:, wanted].tolist()
    # 2) Split them: the first 0 ... n fused, the last 0 ... n, all but one.
    steps = len(fused) + 1
    from_left, from_right, without = chances[:steps], chances[steps : 2 * steps], chances[2 * steps :]
    tokenized = batch.rows[0].receiver
    tokens, token_roles = token_texts(tokenized, tokenizer), roles(tokenized)
    return {
        "wanted": visible(tokenizer.decode([wanted])),
        "tokens": [tokens[position] for position in fused.tolist()],
        "roles": [ROLES[token_roles[position]] for position in fused.tolist()],
        ORDERS[0]: from_left,
        ORDERS[1]: from_right,
        "lost": [from_left[-1] - chance for chance in without],
        "says": [visible(tokenizer.decode([token])) for token in logits[:steps].argmax(-1).tolist()],
        "layers": {way: by_layer(batch, kv, wanted) for way, kv in zip(WAYS, (batch.clean, batch.fused), strict=True)},
    }


def _wanted(batch: ReadBatch) -> int:
    """The first token of the right answer, or what the fused receiver says first."""
    (row,), (question,) = batch.rows, batch.questions
    if question.answer:
        return int(tokenize_response(row, question.answer, batch.pair.receiver.tokenizer).ids[0])
    return int(batch.first_logits(batch.fused)[0].argmax())


def by_layer(batch: ReadBatch, kv: KV, token: int) -> list[float]:
    """Returns the probability of a token by the logit lens, after the embedding and after each layer.

    What a family does to the logits behind the head (a cap, a scale) applies to the last layer only.
    """
    model = batch.pair.receiver.model
    out = batch.run_last_token(kv, output_hidden_states=True)
    norm, head = final_norm(model), model.get_output_embeddings()
    logits = [head(norm(state[:, -1])) for state in out.hidden_states[:-1]]  # the last one is normed already
    return [float(layer.float().softmax(-1)[0, token]) for layer in [*logits, out.logits[:, -1]]]


def final_norm(model: Any) -> nn.Module:
    """Returns the norm in front of the vocabulary head. Raises AnalysisError where there is none."""
    norms = [child for child in model.base_model.children() if "Norm" in type(child).__name__]
    if not norms:
        raise AnalysisError(f"expected a receiver with a norm before its head, got {type(model).__name__}; use another")
    return norms[-1]


def most_needed(looks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the token that is most often the costliest to unfuse, in which share of prompts, and the mean cost."""
    tokens = [found["tokens"][int(np.argmax(found["lost"]))] for found in looks]
    ((token, count),) = Counter(tokens).most_common(1)
    lost = float(np.mean([max(found["lost"]) for found in looks]))
    return {"token": token, "share": count / len(looks), "lost": lost}


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: how quickly the answer comes with fused positions, and the position that matters most."""
    alone, fused = (figures["layers"][way][-1] for way in WAYS)
    left, right = (_half(figures["probability"][order]) for order in ORDERS)
    needed = figures["most_needed"]
    return (
        f"The right first token has a mean probability of {alone:.2f} alone and {fused:.2f} fused over "
        f"{figures['questions']} questions; half of the change comes with the first {left:.0%} of the positions fused, "
        f"or with the last {right:.0%}. The most needed position is {needed['token']!r} in "
        f"{100 * needed['share']:.0f}% of the prompts; unfusing the most needed one costs {needed['lost']:.2f} on "
        "average."
    )


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """From the top: one prompt as it is fused, the value of its positions, and all questions by share and by layer."""
    figure, (path, worth, share, layer) = plots.new_mosaic(8.4, ("aa", "bb", "cd"), height_ratios=[1.2, 1, 1])
    plots.legend_above(figure, _draw_path(path, figures["example"]))
    _draw_worth(worth, figures["example"])
    percent = [100 * share_fused for share_fused in figures["share_fused"]]
    plots.draw_lines(share, figures["probability"], percent)
    share.set(xlabel="positions fused (%)", ylabel="probability of the right\nfirst token (0 to 1)", ylim=(0, 1))
    plots.draw_lines(layer, figures["layers"], looks=plots.LOOKS[2:])
    layer.set(xlabel="after layer (0: embedding), logit lens", ylim=(0, 1))
    plots.count_whole(layer.xaxis)
    layer.legend()
    for axes in (share, layer):
        axes.set_title(f"mean over {figures['questions']} questions")
    return figure


def _draw_path(axes: plots.Axes, example: dict[str, Any]) -> Sequence[Any]:
    """Probability while fusing from either end; above, the likeliest token where it changes. Returns legend handles."""
    says, steps = example["says"], len(example["says"])
    left, right = ({f"fused {order} up to here": example[order]} for order in ORDERS)
    handles = plots.draw_lines(axes, left) + plots.draw_lines(axes, right, range(steps, 0, -1), plots.LOOKS[1:])
    for column, (token, before) in enumerate(zip(says, [None, *says], strict=False)):
        if token != before:
            axes.text(column, 1.06, token, rotation=45, ha="left", va="bottom", fontsize=8)
    axes.set(ylabel=f"probability of\n{example['wanted']!r} (0 to 1)", ylim=(0, 1.04), xlim=(-0.5, steps - 0.2))
    axes.set_title("one prompt; above: what is likeliest when fused from the left up to there", pad=34)
    plots.name_columns(axes, ["(none)", *example["tokens"]])
    return handles


def _draw_worth(axes: plots.Axes, example: dict[str, Any]) -> None:
    colours = [plots.COLOURS[3] if role == "message" else plots.COLOURS[7] for role in example["roles"]]
    count = len(colours)
    axes.bar(range(1, count + 1), example["lost"], color=colours)
    axes.axhline(0, color=plots.INK, linewidth=0.6)
    axes.set(ylabel="probability lost\nwithout this position", xlim=(-0.5, count + 0.8))
    axes.set_title("the same prompt: words of the message in pink, template in grey")
    plots.name_columns(axes, example["tokens"], first=1)


def _variants(batch: ReadBatch, fused: Tensor) -> Tensor:
    """``(2 (n + 1) + n, T - 1)`` bool: the first 0 ... n of ``n`` fused positions, the last 0 ... n, all but one."""
    # 1) Which of the fused positions: rows of a triangle, of its mirror image, of an inverted diagonal.
    count = len(fused)
    first = torch.ones(count + 1, count).tril(-1)  # (n + 1, n)
    chosen = torch.cat([first, first.flip(1), 1 - torch.eye(count)]).bool()  # (variants, n)
    # 2) Scatter to all positions of the prompt.
    variants = torch.zeros(len(chosen), batch.clean.key.shape[3], dtype=torch.bool)
    variants[:, fused] = chosen
    return variants.to(batch.clean.key.device)


def _at_shares(chances: Sequence[float]) -> np.ndarray:
    return np.interp(SHARES, np.linspace(0, 1, len(chances)), chances)


def _half(chances: Sequence[float]) -> float:
    """The first of :data:`SHARES` with at least half of the change from nothing to everything fused."""
    # fusing may also lower the probability
    middle, rises = (chances[0] + chances[-1]) / 2, chances[-1] >= chances[0]
    reached = (share for share, chance in zip(SHARES, chances, strict=True) if (chance >= middle) == rises)
    return next(reached, 1.0)
