"""Does what the receiver read before a question stay in the question's own slice of the cache, after all else is dropped?

The cache-enrichment oracle (paper, 3.2, Eq. 2, tables 1 and 10, figure 4). ``direct`` reads the question, ``in sight`` a context
and the question, and ``oracle`` as well, but keeps of its cache only what belongs to the tokens of ``direct``: the same length, better
informed. The context is a number of other questions with their answers (the paper's shots), or a hint that the sharer writes.

The paper does not say at which positions the kept keys stand. Under ``moved`` they are turned back to where the same tokens stand in
``direct`` (:mod:`kvfuse.stages.rope`). Under ``kept`` they stay where they were read, ``direct`` is read there too, and the answer goes on
behind them. To a rotary model the two are the same as long as nothing is kept from before the context.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import batches, judge, mix, spread, turns_keys
from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.demo.lessons import HINT_READING, HINT_REQUEST
from kvfuse.errors import AnalysisError
from kvfuse.language_model import LanguageModel
from kvfuse.methods import FewShot, Single, TextToText
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, from_ids, pad_left
from kvfuse.prompts.chat import Message, as_chat
from kvfuse.prompts.tokenized import TokenizedPrompt, tokenize
from kvfuse.stages.prefill import prefill
from kvfuse.support.plots import COLOURS, INK, MARKERS, legend_above, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIONS = ("moved", "kept")
WAYS = ("direct", "in sight", "oracle")


@dataclass(frozen=True)
class Enriched:
    """A batch of questions, read with and without a context.

    Attributes:
        readings: The questions alone.
        prompt: The same as a batch, at the positions to go on from.
        prefilled: What ``direct`` was prefilled as.
        direct: ``(L, B, H, T - 1, D)``.
        oracle: Likewise: of the cache behind the context, what belongs to the same tokens.
        answers: What is right.
        categories: Of which kind each question is.
    """

    readings: Sequence[AlignedRow]
    prompt: AlignedPrompt
    prefilled: Cache
    direct: KV
    oracle: KV
    answers: Sequence[str]
    categories: Sequence[str]

    def judge(self, study: Study, layers: Sequence[int]) -> np.ndarray:
        """``(2, B)``, see :func:`judge`, with these layers enriched."""
        chosen = torch.zeros(len(self.direct.key), dtype=torch.bool, device=self.direct.key.device)
        chosen[list(layers)] = True
        kv = mix(self.direct, self.oracle, chosen[:, None, None, None, None])
        return judge(study.pair, self.readings, self.prompt, self.prefilled, kv, self.answers)


def run(
    study: Study,
    shots: int | None = None,
    positions: str | None = None,
    questions: int = 120,
    request: str = HINT_REQUEST,
    told: str = HINT_READING,
    hint_tokens: int = 32,
) -> Finding:
    """Measure the three ways, then single layers enriched alone, and the best and the worst of them together.

    Args:
        study: A pair, of which the receiver answers, with questions that have answers.
        shots: How many other questions of the same category stand before each; by default none but a hint of the sharer.
        positions: ``moved`` or ``kept``; by default moved, where the receiver has a rotary embedding to do it with.
        questions: How many to ask.
        request: For a hint, what the sharer is asked, with ``{question}``.
        told: For a hint, what the receiver reads, with ``{hint}`` and ``{question}``.
        hint_tokens: Longest hint.

    Raises:
        AnalysisError: An unknown choice, questions without answers, or a context that changes how the question itself is tokenized.
        PairError: Keys are to be moved that no rotary embedding turns; use ``kept``.
    """
    positions = positions or ("moved" if turns_keys(study.pair.receiver) else "kept")
    if positions not in POSITIONS:
        raise AnalysisError(f"expected positions to be one of {', '.join(POSITIONS)}, got {positions!r}; choose one")
    asked = spread(study.with_answers(), questions)
    receiver = study.pair.receiver
    models = Single("receiver", receiver), Single("sharer", study.pair.sharers[0])
    hinting = TextToText(*models, request=request, reading=told, hint_tokens=hint_tokens)
    seen, sight = [], []
    with torch.no_grad():
        for batch in batches(asked, study.batch_size):
            chats = _hinted(hinting, batch) if shots is None else [_few_shot(study, one, shots) for one in batch]
            seen.append(enrich(receiver, batch, chats, positions))
            sight.append(
                enrich(receiver, [replace(one, prompt=chat) for one, chat in zip(batch, chats, strict=True)], chats)
            )
        layers = list(range(receiver.kv_spec.num_layers))
        judged = {
            "direct": _judge(study, seen, []),
            "in sight": _judge(study, sight, []),
            "oracle": _judge(study, seen, layers),
        }
        alone = [_judge(study, seen, [layer]) for layer in layers]
        ranked = sorted(layers, key=lambda layer: -alone[layer][1].mean())
        cumulative = {
            name: [_figures(_judge(study, seen, order[:count])) for count in range(1, len(layers) + 1)]
            for name, order in (("best", ranked), ("worst", ranked[::-1]))
        }
    categories = [category for one in seen for category in one.categories]
    figures = {
        "questions": len(asked),
        "context": "a hint" if shots is None else f"{shots} shots",
        "positions": positions,
        "ways": {way: _figures(one) for way, one in judged.items()},
        "categories": _by_category(judged, categories),
        "layers": [_figures(one) for one in alone],
        "ranked": ranked,
        "cumulative": cumulative,
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def enrich(
    receiver: LanguageModel,
    questions: Sequence[Question],
    contexts: Sequence[Sequence[Message]],
    positions: str = "moved",
) -> Enriched:
    """Read questions alone and behind a context.

    Args:
        receiver: The model that reads.
        questions: With answers.
        contexts: For each the chat that has the context too.
        positions: See the module.
    """
    mine, theirs = (
        [tokenize(prompt, receiver.tokenizer) for prompt in prompts]
        for prompts in ([one.prompt for one in questions], contexts)
    )
    prompt, behind = _batch(mine), _batch(theirs)
    source = pad_left([kept_tokens(one.ids, other.ids) for one, other in zip(mine, theirs, strict=True)], 0)[
        0
    ]  # within a row
    source = source + (behind.mask.shape[1] - behind.mask.sum(1))[:, None]  # within the batch
    if positions == "kept":
        prompt = replace(prompt, positions=torch.where(prompt.mask > 0, behind.positions.gather(1, source), 0))
    prefilled = prefill(receiver.model, prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.positions[:, :-1])
    direct = read_cache(prefilled)
    full = read_cache(prefill(receiver.model, behind.ids[:, :-1], behind.mask[:, :-1], behind.positions[:, :-1]))
    oracle = _kept(receiver, direct, full, prompt, behind, source, turned=positions == "moved")
    readings = [AlignedRow(one, np.zeros(len(one.ids), dtype=bool), ()) for one in mine]
    return Enriched(
        readings,
        prompt,
        prefilled,
        direct,
        oracle,
        [str(one.answer) for one in questions],
        [one.category or "all" for one in questions],
    )


def kept_tokens(ids: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Where a prompt's tokens stand in the same prompt with something put in: as many as can be behind it, the others before.

    Args:
        ids: ``(n,)`` int64.
        behind: ``(m,)`` int64, the longer one.

    Returns:
        ``(n,)`` int64, places in ``behind``.

    Raises:
        AnalysisError: The second is not the first with one stretch put in.
    """
    count, more = len(ids), len(behind) - len(ids)
    same = ids == behind[more:] if more >= 0 else np.zeros(count, dtype=bool)
    before = 0 if same.all() else count - int(np.argmin(same[::-1]))  # tokens that differ, and all before them
    if more < 0 or not np.array_equal(ids[:before], behind[:before]):
        raise AnalysisError(
            "expected a context that leaves the question's own tokens as they are, got others; write it apart from it"
        )
    return np.arange(count) + np.where(np.arange(count) < before, 0, more)


def reading(figures: dict[str, Any]) -> str:
    """Two sentences."""
    right = {way: 100 * figures["ways"][way]["accuracy"] for way in WAYS}
    nats = {way: figures["ways"][way]["nats"] for way in WAYS}
    layers, best = figures["layers"], figures["ranked"][0]
    return (
        f"With {figures['context']} before each of {figures['questions']} questions the receiver is right on {right['in sight']:.1f}%, "
        f"{right['direct']:.1f}% without; with the context read, then dropped, on {right['oracle']:.1f}% at the length of the question "
        f"alone. The right answer has {nats['direct']:.2f} nats direct, {nats['in sight']:.2f} with the context in sight, "
        f"{nats['oracle']:.2f} with it dropped. "
        f"Of single layers, layer {best} gains most when it alone is enriched: {layers[best]['nats'] - nats['direct']:+.2f} nats."
    )


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """The three ways by category, single layers, and the best and worst of them together."""
    names = ["all", *figures["categories"]] if len(figures["categories"]) > 1 else ["all"]
    shares = {"all": {way: one["accuracy"] for way, one in figures["ways"].items()}, **figures["categories"]}
    figure, (kinds, single, together) = _panels(2.4 + 0.5 * len(names))
    shown = []
    for place, (way, colour) in enumerate(zip(WAYS, COLOURS, strict=False)):
        lines = [line + 0.26 * (place - 1) for line in range(len(names))]
        shown.append(kinds.barh(lines, [100 * shares[name][way] for name in names], 0.24, color=colour, label=way))
        kinds.bar_label(shown[-1], fmt="%.0f", padding=3, fontsize=8)
    kinds.set_yticks(range(len(names)), names)
    kinds.invert_yaxis()
    kinds.set(xlim=(0, 104), xlabel="right answers (%)")
    legend_above(figure, shown)
    _draw_layers(single, together, figures)
    return figure


def _panels(height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height + 2.8), layout="constrained")
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [["kinds", "kinds"], ["single", "together"]], height_ratios=[height - 1.2, 2.8]
    )
    return figure, [panels[name] for name in ("kinds", "single", "together")]


def _draw_layers(single: "Axes", together: "Axes", figures: dict[str, Any]) -> None:
    direct, sight, oracle = (figures["ways"][way]["nats"] for way in WAYS)
    single.plot([one["nats"] for one in figures["layers"]], "o", color=COLOURS[0])
    single.set(xlabel="the one layer enriched", ylabel="log-probability of the\nright answer (nats)")
    for name, order in figures["cumulative"].items():
        place = ("best", "worst").index(name)
        counts = range(1, len(order) + 1)
        nats = [one["nats"] for one in order]
        together.plot(counts, nats, marker=MARKERS[place], color=COLOURS[2 + place], label=f"{name} first")
    together.set(xlabel="number of layers enriched")
    together.sharey(single)
    for axes in (single, together):
        axes.axhline(direct, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.axhline(oracle, color=INK, linewidth=0.8)
        axes.axhline(sight, color=INK, linewidth=1.2, linestyle=":")
        axes.locator_params(axis="x", integer=True)
    single.set_title("dashed: direct; solid: oracle; dotted: in sight", loc="left", fontsize=9)
    together.legend()


def _hinted(hinting: TextToText, batch: Sequence[Question]) -> list[Sequence[Message]]:
    return [as_chat(one.prompt) for one in hinting.augment([one.prompt for one in batch])]


def _few_shot(study: Study, question: Question, shots: int) -> Sequence[Message]:
    """Others of the same category, about other things, drawn anew for each question."""
    others = [one for one in study.questions if one.category == question.category and one.prompt != question.prompt]
    others = [one for one in others if one.group is None or one.group != question.group] or list(study.questions)
    drawn = [others[place] for place in np.random.default_rng(study.seed).permutation(len(others))[:shots]]
    turns = [
        message
        for one in drawn
        for message in (*as_chat(one.prompt), {"role": "assistant", "content": str(one.answer)})
    ]
    return as_chat(FewShot(Single("receiver", study.pair.receiver), turns).augment([question.prompt])[0].prompt)


def _batch(readings: Sequence[TokenizedPrompt]) -> AlignedPrompt:
    ids, mask = pad_left([one.ids for one in readings], readings[0].pad_id)
    return from_ids(ids, num_sharers=0, mask=mask)


def _kept(
    receiver: LanguageModel,
    direct: KV,
    full: KV,
    prompt: AlignedPrompt,
    behind: AlignedPrompt,
    source: Tensor,
    turned: bool,
) -> KV:
    """The cache behind the context, at the tokens of the question alone; keys turned to the question's own positions if need be."""
    rows, columns = prompt.mask[:, :-1].nonzero(as_tuple=True)
    theirs = source[rows, columns]
    kept = full.tokens(rows, theirs)
    if turned and not torch.equal(prompt.positions[rows, columns], behind.positions[rows, theirs]):
        dtype = full.key.dtype
        kept = receiver.rope.at(behind.positions, rows, theirs, dtype).remove(kept)
        kept = receiver.rope.at(prompt.positions, rows, columns, dtype).apply(kept)
    return direct.zeros_like().add_tokens(rows, columns, kept)


def _judge(study: Study, seen: Sequence[Enriched], layers: Sequence[int]) -> np.ndarray:
    """``(2, questions)``."""
    return np.concatenate([one.judge(study, layers) for one in seen], axis=1)


def _figures(judged: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(judged[0].mean()), "nats": float(judged[1].mean())}


def _by_category(judged: dict[str, np.ndarray], categories: Sequence[str]) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = defaultdict(dict)
    for category in sorted(set(categories)):
        mine = np.array([one == category for one in categories])
        shares[category] = {way: float(one[0][mine].mean()) for way, one in judged.items()}
    return dict(shares)
