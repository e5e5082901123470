"""Does a context that was read before a question stay in the question's slice of the cache, after the rest is dropped?

The cache-enrichment oracle (paper, 3.2, Eq. 2, tables 1 and 10, figure 4). ``direct`` reads the question. ``in sight``
reads a context and then the question. ``oracle`` reads both as well, but keeps of the cache only the tokens of
``direct``: the same length, better informed. The context is a few other questions with their answers (the paper's
shots), or a hint that the sharer writes.

The paper does not say at which positions the kept keys are. Under ``moved`` they are rotated to the positions of the
same tokens in ``direct`` (:mod:`kvfuse.stages.rope`). Under ``kept`` they stay at their positions, ``direct`` is read
at the same ones, and the answer continues from there. To a rotary model the two are the same as long as nothing before
the context is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import ReadBatch, read_alone, uses_rope
from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.demo.lessons import HINT_READING, HINT_REQUEST
from kvfuse.errors import AnalysisError
from kvfuse.methods import FewShot, Single, TextToText
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import pad_left
from kvfuse.prompts.messages import Message, as_chat
from kvfuse.prompts.tokenized import tokenize
from kvfuse.support import plots

POSITIONS = ("moved", "kept")
WAYS = ("direct", "in sight", "oracle")


@dataclass(frozen=True)
class Enriched:
    """A batch of questions, read by the receiver with and without a context.

    Attributes:
        direct: The questions alone.
        in_sight: The contexts and the questions.
        oracle: ``(L, B, H, T - 1, D)`` as ``direct.clean``, cut out of ``in_sight.clean``.
    """

    direct: ReadBatch
    in_sight: ReadBatch
    oracle: KV

    def score(self, layers: Sequence[int]) -> np.ndarray:
        """``(2, B)``: :meth:`ReadBatch.score_answers` with these layers enriched."""
        chosen = torch.zeros(len(self.oracle.key), dtype=torch.bool, device=self.oracle.key.device)  # (L,)
        chosen[list(layers)] = True
        return self.direct.score_answers(self.direct.mix(self.oracle, chosen[:, None, None, None, None]))


def run(
    study: Study,
    shots: int | None = None,
    positions: str | None = None,
    questions: int = 120,
    request: str = HINT_REQUEST,
    told: str = HINT_READING,
    hint_tokens: int = 32,
) -> Finding:
    """Measure the three ways, then each layer enriched alone, and the best and the worst layers together.

    Args:
        study: A pair, of which the receiver answers, with questions that have answers.
        shots: Number of other questions of the same category before each; by default the context is a hint of the
            sharer.
        positions: ``moved`` or ``kept``; by default moved, where the receiver has a rotary embedding.
        questions: Number of questions to ask.
        request: Prompt for a hint, with ``{question}``.
        told: Prompt of the receiver with a hint, with ``{hint}`` and ``{question}``.
        hint_tokens: Longest hint.

    Raises:
        AnalysisError: An unknown choice, questions without answers, or a context that changes how the question itself
            is tokenized.
        PairError: Keys cannot be moved because no rotary embedding turns them; use ``kept``.
    """
    pair = study.pair
    positions = positions or ("moved" if uses_rope(pair.receiver) else "kept")
    if positions not in POSITIONS:
        raise AnalysisError(f"expected positions to be one of {', '.join(POSITIONS)}, got {positions!r}; choose one")
    asked = study.with_answers().spread(questions)
    models = Single("receiver", pair.receiver), Single("sharer", pair.sharers[0])
    hints = TextToText(*models, request=request, reading=told, hint_tokens=hint_tokens)

    # 1) Read all questions with and without their contexts.
    batches = []
    for indices in asked.batches():
        batch = [asked.questions[index] for index in indices]
        if shots is None:
            prompts = [question.prompt for question in batch]
            contexts = [as_chat(augmented.prompt) for augmented in hints.augment(prompts)]
        else:
            contexts = [_few_shot(study, question, shots) for question in batch]
        batches.append(enrich(pair, batch, contexts, positions))

    # 2) Score the answers in all three ways, and with each layer enriched alone.
    layers = list(range(pair.receiver.kv_spec.num_layers))
    in_sight = [batch.in_sight.score_answers(batch.in_sight.clean) for batch in batches]
    scores = {
        "direct": _score(batches, []),
        "in sight": np.concatenate(in_sight, axis=1),
        "oracle": _score(batches, layers),
    }
    single = [_score(batches, [layer]) for layer in layers]

    # 3) Enrich ever more layers, the best or the worst first.
    ranked = sorted(layers, key=lambda layer: -single[layer][1].mean())
    cumulative = {
        name: [_figures(_score(batches, order[:count])) for count in range(1, len(layers) + 1)]
        for name, order in (("best", ranked), ("worst", ranked[::-1]))
    }
    categories = np.array([question.category or "all" for batch in batches for question in batch.direct.questions])
    figures = {
        "questions": len(asked.questions),
        "context": "a hint" if shots is None else f"{shots} shots",
        "positions": positions,
        "ways": {way: _figures(scored) for way, scored in scores.items()},
        "categories": {
            category: {way: float(scored[0][categories == category].mean()) for way, scored in scores.items()}
            for category in sorted(set(categories.tolist()))
        },
        "layers": [_figures(scored) for scored in single],
        "ranked": ranked,
        "cumulative": cumulative,
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def enrich(
    pair: CacheToCache, questions: Sequence[Question], contexts: Sequence[Sequence[Message]], positions: str = "moved"
) -> Enriched:
    """Read questions alone and behind a context.

    Args:
        pair: Its receiver reads.
        questions: With answers.
        contexts: For each the chat that has the context too.
        positions: See the module.
    """
    short = [tokenize(question.prompt, pair.receiver.tokenizer) for question in questions]
    long = [tokenize(chat, pair.receiver.tokenizer) for chat in contexts]
    in_sight = read_alone(pair, questions, long)
    # 1) Find each token of the question in the longer prompt: (B, T) columns of the padded batch.
    columns = pad_left([kept_tokens(row.ids, longer.ids) for row, longer in zip(short, long, strict=True)], 0)[0]
    mask = in_sight.prompt.mask
    columns = columns + (mask.shape[1] - mask.sum(1))[:, None]
    # 2) Read the questions alone, at the kept positions if wanted.
    kept = None if positions == "moved" else in_sight.prompt.positions.gather(1, columns)
    direct = read_alone(pair, questions, short, kept)
    # 3) Cut the same tokens out of the longer cache.
    return Enriched(direct, in_sight, _cut_out(direct=direct, in_sight=in_sight, columns=columns))


def kept_tokens(ids: np.ndarray, longer: np.ndarray) -> np.ndarray:
    """Find a prompt's tokens in the same prompt with a context inserted: as many as possible behind it, others before.

    Args:
        ids: ``(n,)`` int64.
        longer: ``(m,)`` int64, with the context.

    Returns:
        ``(n,)`` int64, indices into ``longer``.

    Raises:
        AnalysisError: The longer prompt is not the shorter one with one stretch inserted.
    """
    count, inserted = len(ids), len(longer) - len(ids)
    same = ids == longer[inserted:] if inserted >= 0 else np.zeros(count, dtype=bool)
    before = 0 if same.all() else count - int(np.argmin(same[::-1]))  # tokens up to the last that differs
    if inserted < 0 or not np.array_equal(ids[:before], longer[:before]):
        raise AnalysisError(
            "expected a context that leaves the question's own tokens as they are, got others; write it apart from it"
        )
    return np.arange(count) + np.where(np.arange(count) < before, 0, inserted)


def reading(figures: dict[str, Any]) -> str:
    """Two sentences on the three ways, one on single layers."""
    right = {way: 100 * figures["ways"][way]["accuracy"] for way in WAYS}
    nats = {way: figures["ways"][way]["nats"] for way in WAYS}
    layers, best = figures["layers"], figures["ranked"][0]
    return (
        f"With {figures['context']} before each of {figures['questions']} questions the receiver is right on "
        f"{right['in sight']:.1f}%, {right['direct']:.1f}% without; with the context read, then dropped, on "
        f"{right['oracle']:.1f}% at the length of the question alone. The right answer has {nats['direct']:.2f} nats "
        f"direct, {nats['in sight']:.2f} with the context in sight, {nats['oracle']:.2f} with it dropped. Of single "
        f"layers, layer {best} gains most when it alone is enriched: {layers[best]['nats'] - nats['direct']:+.2f} nats."
    )


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """The three ways by category; below, single layers, and the best and worst of them together."""
    names = ["all", *figures["categories"]] if len(figures["categories"]) > 1 else ["all"]
    shares = {"all": {way: found["accuracy"] for way, found in figures["ways"].items()}, **figures["categories"]}
    height = 2.4 + 0.5 * len(names)
    figure, (kinds, single, together) = plots.new_mosaic(height + 2.8, ("aa", "bc"), height_ratios=[height - 1.2, 2.8])
    handles = []
    for index, (way, colour) in enumerate(zip(WAYS, plots.COLOURS, strict=False)):
        lines = [line + 0.26 * (index - 1) for line in range(len(names))]
        handles.append(kinds.barh(lines, [100 * shares[name][way] for name in names], 0.24, color=colour, label=way))
        kinds.bar_label(handles[-1], fmt="%.0f", padding=3, fontsize=8)
    kinds.set_yticks(range(len(names)), names)
    kinds.invert_yaxis()
    kinds.set(xlim=(0, 104), xlabel="right answers (%)")
    plots.legend_above(figure, handles)
    _draw_layers(single, together, figures)
    return figure


def _draw_layers(single: plots.Axes, together: plots.Axes, figures: dict[str, Any]) -> None:
    single.plot([layer["nats"] for layer in figures["layers"]], "o", color=plots.COLOURS[0])
    single.set(xlabel="the one layer enriched", ylabel="log-probability of the\nright answer (nats)")
    nats = {f"{name} first": [found["nats"] for found in order] for name, order in figures["cumulative"].items()}
    plots.draw_lines(together, nats, range(1, len(figures["layers"]) + 1), plots.LOOKS[2:])
    together.set(xlabel="number of layers enriched")
    together.sharey(single)
    levels = {"direct": (0.8, plots.DASHED), "in sight": (1.2, ":"), "oracle": (0.8, "-")}
    for axes in (single, together):
        for way, (width, line) in levels.items():
            axes.axhline(figures["ways"][way]["nats"], color=plots.INK, linewidth=width, linestyle=line)
        plots.count_whole(axes.xaxis)
    single.set_title("dashed: direct; solid: oracle; dotted: in sight")
    together.legend()


def _few_shot(study: Study, question: Question, shots: int) -> Sequence[Message]:
    """Others of the same category about other topics before the question; the draw is the same for equal candidates."""
    # 1) Candidates: where there are none, any question.
    similar = [
        shot for shot in study.questions if shot.category == question.category and shot.prompt != question.prompt
    ]
    others = [shot for shot in similar if shot.group is None or shot.group != question.group] or study.questions
    # 2) Draw them, and write them as turns of a chat.
    turns: list[Message] = []
    for index in np.random.default_rng(study.seed).permutation(len(others))[:shots]:
        answer = {"role": "assistant", "content": str(others[index].answer)}
        turns += [*as_chat(others[index].prompt), answer]
    return as_chat(FewShot(Single("receiver", study.pair.receiver), turns).augment([question.prompt])[0].prompt)


def _cut_out(*, direct: ReadBatch, in_sight: ReadBatch, columns: Tensor) -> KV:
    """Cut the tokens of the question out of the longer cache; keys are rotated to the positions of ``direct``.

    Args:
        direct: The question alone.
        in_sight: With its context.
        columns: ``(B, T)`` int64: for each token of ``direct`` its column in ``in_sight``.

    Returns:
        ``(L, B, H, T - 1, D)``, zero under padding.
    """
    receiver, positions = direct.pair.receiver, direct.prompt.positions
    rows, tokens = direct.prompt.mask[:, :-1].nonzero(as_tuple=True)  # (N,) each
    sources = columns[rows, tokens]
    kept = in_sight.clean.tokens(rows, sources)  # (L, 1, H, N, D)
    if not torch.equal(positions[rows, tokens], in_sight.prompt.positions[rows, sources]):
        dtype = kept.key.dtype
        kept = receiver.rope.at(in_sight.prompt.positions, rows, sources, dtype).remove(kept)
        kept = receiver.rope.at(positions, rows, tokens, dtype).apply(kept)
    return direct.clean.zeros_like().add_tokens(rows, tokens, kept)


def _score(batches: Sequence[Enriched], layers: Sequence[int]) -> np.ndarray:
    """``(2, questions)``: :meth:`Enriched.score` of all batches."""
    return np.concatenate([batch.score(layers) for batch in batches], axis=1)


def _figures(scored: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(scored[0].mean()), "nats": float(scored[1].mean())}
