"""How does the gain depend on the length of prompt and answer, with rotary positions kept in the keys, and removed?

Prompts grow in two ways. ``filled`` puts irrelevant text before the question, so that all models have more to read;
``shifted`` leaves the text as it is but moves it to later positions, to which a rotary model by itself is indifferent:
any loss there is the fuser's, because it sees keys as the caches hold them, rotated by their positions
(``fuser.rope=kept``). A fuser for ``removed`` is named by its folder; without one, both kinds are fitted in closed form
(:class:`kvfuse.fusers.ridge.RidgeFuser`), which gains less.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import read, read_batches, uses_rope
from kvfuse.analysis.study import Question, Study
from kvfuse.cache.kv import KV
from kvfuse.checkpoint import load_fuser
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.scoring.statistics import Interval, bootstrap_mean
from kvfuse.fusers import Fuser, make_fuser
from kvfuse.fusers.base import ROPES
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.messages import as_chat
from kvfuse.prompts.response import tokenize_response
from kvfuse.prompts.tokenized import tokenize
from kvfuse.support import plots

FILLER = "Thank you for your help. "
FIT_BATCH = 16
ALONE = "alone"
Scores = dict[str, np.ndarray]
"""By name, ``alone`` first: ``(2, questions)``, see :meth:`kvfuse.analysis.readout.ReadBatch.score_answers`."""


def run(
    study: Study,
    removed: str | None = None,
    questions: int = 60,
    most: int = 64,
    points: int = 5,
    filler: str = FILLER,
    fitted: int = 320,
) -> Finding:
    """Ask the same questions at growing length.

    Args:
        study: A pair with questions that have answers.
        removed: Folder of a fuser for the same pair, trained with ``fuser.rope=removed``.
        questions: Number of questions to ask.
        most: Most tokens to add, as far as the models' contexts have room.
        points: Number of lengths, evenly from no added token to ``most``.
        filler: Text to fill with, repeated.
        fitted: Number of questions to fit closed-form fusers to; other than those that are asked, if there are others.

    Raises:
        AnalysisError: Questions without answers, several sharers, or fewer than two points.
    """
    if len(study.pair.sharers) != 1 or points < 2:
        raise AnalysisError(
            f"expected one sharer and two points or more, got {len(study.pair.sharers)} and {points}; change them"
        )
    asked = study.with_answers().spread(questions)
    # 1) The fusers to compare, and the lengths.
    trained = f"{study.pair.fusers[0].config.rope} (trained)"
    pairs = {trained: study.pair, **_other_pairs(study, asked, removed, fitted)}
    shares = np.linspace(0, 1, 2 if study.smoke else points)
    added = sorted({round(share * min(most, _room(asked))) for share in shares})
    # 2) Ask at each length: with filler at the usual positions, without filler at shifted ones.
    filled = [ask(_fill(asked, filler, count), pairs) for count in added]
    shifted = [ask(asked, pairs, count) for count in added]
    figures = {
        "questions": len(asked.questions),
        "added_tokens": added,
        "prompts": {
            way: {name: [_figures(scores, name, asked.groups) for scores in by_length] for name in (ALONE, *pairs)}
            for way, by_length in (("filled", filled), ("shifted", shifted))
        },
        # 3) Nothing is added in the first row: split it by the length of the answer.
        "responses": _by_response(asked, filled[0]),
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def ask(study: Study, pairs: Mapping[str, CacheToCache], shift: int = 0) -> Scores:
    """Score the right answers from the receiver's clean cache and from the one that each pair fuses.

    Args:
        study: The questions, and the pair whose receiver answers alone.
        pairs: The same models with several fusers, by name; one of them is the study's.
        shift: Added to all positions.
    """
    scores = {name: np.zeros((2, len(study.questions))) for name in (ALONE, *pairs)}
    for indices in study.batches():
        questions = [study.questions[index] for index in indices]
        for name, pair in pairs.items():
            batch = read(pair, questions, shift)
            scores[name][:, indices] = batch.score_answers(batch.fused)
            if pair is study.pair:  # the receiver's own cache is the same for all pairs
                scores[ALONE][:, indices] = batch.score_answers(batch.clean)
    return scores


def fit_ridge(study: Study, rope: str) -> CacheToCache:
    """Returns the study's pair with a fuser fitted in closed form to the caches of its questions."""
    # 1) A fuser for the same pair and alignment.
    config, device = study.pair.fusers[0].config, study.pair.receiver.model.device
    options = {name: getattr(config, name) for name in ("token_alignment", "layer_alignment", "fuse")}
    fuser = make_fuser("ridge", receiver=config.receiver, sharer=config.sharer, rope=rope, **options).eval().to(device)
    pair = CacheToCache(study.pair.receiver, study.pair.sharers, [fuser])
    # 2) Fit it to batches of caches, at least two.
    batch_size = max(1, min(FIT_BATCH, len(study.questions) // 2))
    fuser.fit(_aligned_caches(replace(study, pair=pair, batch_size=batch_size), fuser))
    return pair


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: the gain of the trained fuser by length, and what a shift does to the others."""
    gains = {
        way: {name: [100 * row["gain"] for row in rows] for name, rows in lines.items()}
        for way, lines in figures["prompts"].items()
    }
    _, trained, *others = gains["filled"]
    filled, shifted, most = gains["filled"][trained], gains["shifted"][trained], figures["added_tokens"][-1]
    changes = [f"{name} {gains['shifted'][name][-1] - gains['shifted'][name][0]:+.1f}" for name in others]
    return (
        f"Fused with rope {trained}, the receiver gains {filled[0]:+.1f} points over itself; with {most} tokens of "
        f"filler {filled[-1]:+.1f}, and {shifted[-1]:+.1f} where the same prompt is only read {most} positions later. "
        f"That shift changes the gain of other fusers by (rope): {', '.join(changes)} points."
    )


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """Accuracy by length of the prompt in both ways, and by tokens of the answer."""
    figure, (filled, shifted, answer) = plots.new_panels(4.0, 3, sharey=True)
    added, groups = figures["added_tokens"], figures["responses"]
    handles = _draw_lines(filled, added, figures["prompts"]["filled"])
    _draw_lines(shifted, added, figures["prompts"]["shifted"])
    by_answer = {name: [group["ways"][name] for group in groups] for name in figures["prompts"]["filled"]}
    _draw_lines(answer, [group["tokens"] for group in groups], by_answer)
    filled.set(xlabel="tokens of filler added", ylabel="right answers (%)", ylim=(-3, 103))
    shifted.set(xlabel="positions shifted")
    answer.set(xlabel="tokens of the answer")
    plots.count_whole(answer.xaxis)
    plots.legend_above(figure, handles)
    return figure


def _draw_lines(axes: plots.Axes, x: Sequence[float], lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Any]:
    """A line per fuser, the receiver alone in the colour of the text; returns legend handles."""
    accuracies = {name: [100 * row["accuracy"] for row in rows] for name, rows in lines.items()}
    labelled = {name if name == ALONE else f"rope {name}": values for name, values in accuracies.items()}
    colours = (plots.INK, *plots.COLOURS)
    return plots.draw_lines(axes, labelled, x, list(zip(colours, plots.MARKERS, strict=False)))


def _other_pairs(study: Study, asked: Study, removed: str | None, fitted: int) -> dict[str, CacheToCache]:
    """The same models with other fusers: the one in ``removed``, or closed-form ones."""
    receiver, sharers = study.pair.receiver, study.pair.sharers
    if removed is not None:
        fuser = load_fuser(removed, dtype=study.pair.fusers[0].dtype)
        if fuser.config.rope != "removed":
            raise AnalysisError(
                f"expected a fuser trained with fuser.rope=removed, got {fuser.config.rope!r}; name another folder"
            )
        return {"removed (trained)": CacheToCache(receiver, sharers, [fuser.to(receiver.model.device)])}
    # 1) Questions to fit to: unasked ones, if there are any.
    prompts = {str(question.prompt) for question in asked.questions}
    unasked = [question for question in study.questions if str(question.prompt) not in prompts]
    data = replace(study, questions=unasked or asked.questions).spread(fitted)
    # 2) Positions can be removed only where both models rotate their keys.
    rotary = all(map(uses_rope, (receiver, *sharers)))
    return {f"{rope} (ridge)": fit_ridge(data, rope) for rope in ROPES if rope == "kept" or rotary}


def _aligned_caches(study: Study, fuser: Fuser) -> Iterator[tuple[KV, KV]]:
    """Both models' caches of the tokens that are fused, as the fuser sees them, batch by batch."""
    for batch in read_batches(study):
        picked = batch.select_tokens(next(fuser.parameters()))
        if picked is not None:
            yield picked.receiver, picked.sharer


def _fill(study: Study, filler: str, count: int) -> Study:
    """The same questions behind ``count`` of the receiver's tokens of filler, its last sentence cut short."""
    if not count:
        return study
    tokenizer = study.pair.receiver.tokenizer
    ids = tokenizer(filler * count, add_special_tokens=False).input_ids[: count - 1]  # the space may be one more
    text = tokenizer.decode(ids).strip() + " "
    return replace(study, questions=[_prepend(question, text) for question in study.questions])


def _prepend(question: Question, text: str) -> Question:
    *others, last = as_chat(question.prompt)
    return replace(question, prompt=[*others, {**last, "content": text + last["content"]}])


def _room(study: Study) -> int:
    """Number of tokens that can be added to every prompt and its answer in every model's context."""
    # models without a limit are left out
    rooms = [
        model.context - max(_length(model, question) for question in study.questions)
        for model in (study.pair.receiver, *study.pair.sharers)
        if model.context is not None
    ]
    return max(0, min(rooms, default=2**20))


def _length(model: LanguageModel, question: Question) -> int:
    """Tokens of a prompt, its answer and the end."""
    answer = model.tokenizer(str(question.answer), add_special_tokens=False).input_ids
    return len(tokenize(question.prompt, model.tokenizer).ids) + len(answer) + 1


def _by_response(study: Study, scores: Scores) -> list[dict[str, Any]]:
    """The figures by number of tokens of the answer."""
    tokenizer = study.pair.receiver.tokenizer
    rows = [study.pair.align(question.prompt) for question in study.questions]
    answers = [str(question.answer) for question in study.questions]
    lengths = np.array(
        [len(tokenize_response(row, answer, tokenizer).ids) for row, answer in zip(rows, answers, strict=True)]
    )
    groups = []
    for length in np.unique(lengths).tolist():
        chosen = lengths == length
        subset = {name: scored[:, chosen] for name, scored in scores.items()}
        ways = {name: _figures(subset, name, study.groups[chosen]) for name in subset}
        groups.append({"tokens": length, "ways": ways})
    return groups


def _figures(scores: Scores, name: str, groups: np.ndarray) -> dict[str, float | Interval | int]:
    """Accuracy, and the gain over the receiver alone: in accuracy, and in nats of the right answer."""
    right, nats = scores[name] - scores[ALONE]
    gain, interval = bootstrap_mean(right, groups)
    return {
        "questions": len(groups),
        "accuracy": float(scores[name][0].mean()),
        "gain": gain,
        "interval": interval,
        "nats": float(nats.mean()),
    }
