"""How does the gain of fusing depend on the length of prompt and answer, with rotary positions kept in the keys and with them removed?

Prompts grow in two ways. ``filled`` puts a text of no use before the question, so that all models have more to read; ``shifted`` leaves
the text as it is and lets all models read it at later positions, to which a rotary model alone is indifferent: what is lost there
is lost by a fuser that sees keys as the caches hold them, turned by their positions (``fuser.rope=kept``). A fuser for ``removed`` is
given by its folder; without one both are fitted in closed form (:class:`kvfuse.fusers.ridge.RidgeFuser`), which gains less.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.readout import batches, judge, spread, turns_keys
from kvfuse.analysis.study import Question, Study
from kvfuse.cache.transformers_cache import read_cache
from kvfuse.checkpoint import load_fuser
from kvfuse.errors import AnalysisError
from kvfuse.evaluation.scoring.statistics import Interval, bootstrap_mean
from kvfuse.fusers import Fuser, make_fuser
from kvfuse.fusers.base import ROPES
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.chat import Prompt, as_chat
from kvfuse.prompts.response import tokenize_response
from kvfuse.prompts.tokenized import tokenize
from kvfuse.support.plots import COLOURS, INK, MARKERS, legend_above, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILLER = "Thank you for your help. "
FIT_BATCH = 16


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
        removed: Folder of a fuser for the same pair that was trained with ``fuser.rope=removed``.
        questions: How many to ask.
        most: Tokens to add at most, as far as the models' contexts have room.
        points: Lengths to ask at, evenly from none to ``most``.
        filler: What to fill with, repeated.
        fitted: Questions that closed-form fusers are fitted to, none of those that are asked unless there are no more.

    Raises:
        AnalysisError: Questions without answers, several sharers, or fewer than two points.
    """
    if len(study.pair.sharers) != 1 or points < 2:
        raise AnalysisError(
            f"expected one sharer and two points or more, got {len(study.pair.sharers)} and {points}; change them"
        )
    asked = spread(study.with_answers(), questions)
    if study.smoke:
        points = 2
    pairs = {f"{study.pair.fusers[0].config.rope} (trained)": study.pair, **_others(study, asked, removed, fitted)}
    room = _room(study.pair, asked)
    added = sorted({round(share * min(most, room)) for share in np.linspace(0, 1, points)})
    ways: dict[str, Any] = {}
    with torch.no_grad():
        filled = {count: [_fill(study.pair.receiver, one, filler, count) for one in asked] for count in added}
        put = {"filled": [(filled[count], 0) for count in added], "shifted": [(asked, count) for count in added]}
        for way, asking in put.items():
            alone = [_ask(study, study.pair, some, shifted, fused=False) for some, shifted in asking]
            ways[way] = {"alone": [_figures(one, one, asked) for one in alone]}
            for name, pair in pairs.items():
                fused = [_ask(study, pair, some, shifted) for some, shifted in asking]
                ways[way][name] = [_figures(one, its, asked) for one, its in zip(fused, alone, strict=True)]
        first = {name: _ask(study, pair, asked, 0) for name, pair in pairs.items()}
        by_response = _by_response(study, asked, _ask(study, study.pair, asked, 0, fused=False), first)
    figures = {"questions": len(asked), "added_tokens": added, "prompts": ways, "responses": by_response}
    return Finding(figures, reading(figures), lambda: draw(figures))


def fit_ridge(study: Study, questions: Sequence[Question], rope: str) -> CacheToCache:
    """The study's pair with a fuser in closed form, fitted to the caches of some prompts."""
    config = study.pair.fusers[0].config
    options = {
        "token_alignment": config.token_alignment,
        "layer_alignment": config.layer_alignment,
        "fuse": config.fuse,
    }
    fuser = make_fuser("ridge", receiver=config.receiver, sharer=config.sharer, rope=rope, **options).eval()
    pair = CacheToCache(study.pair.receiver, study.pair.sharers, [fuser.to(study.pair.receiver.model.device)])
    half = max(1, min(FIT_BATCH, len(questions) // 2))
    caches = (_caches(pair, fuser, batch) for batch in batches(questions, half))
    fuser.fit(one for one in caches if one is not None)
    return pair


def shift(prompt: AlignedPrompt, by: int) -> AlignedPrompt:
    """The same batch, read by all models at positions that are so much later."""
    sharers = tuple(replace(one, positions=one.positions + by) for one in prompt.sharers)
    return replace(prompt, positions=prompt.positions + by, sharers=sharers)


def reading(figures: dict[str, Any]) -> str:
    """Two sentences on the fuser as it was trained, one on the others."""
    name, most = next(one for one in figures["prompts"]["filled"] if one != "alone"), figures["added_tokens"][-1]
    gains = {way: [100 * one["gain"] for one in figures["prompts"][way][name]] for way in ("filled", "shifted")}
    others = [other for other in figures["prompts"]["shifted"] if other not in ("alone", name)]
    lost = [
        f"{other} {100 * (rows[-1]['gain'] - rows[0]['gain']):+.1f}"
        for other in others
        for rows in [figures["prompts"]["shifted"][other]]
    ]
    return (
        f"Fused with rope {name}, the receiver gains {gains['filled'][0]:+.1f} points over itself; with {most} tokens of filler "
        f"{gains['filled'][-1]:+.1f}, and {gains['shifted'][-1]:+.1f} where the same prompt is only read {most} positions later. "
        f"That shift changes the gain of other fusers by (rope): {', '.join(lost)} points."
    )


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """Accuracy by length of the prompt in both ways, and by tokens of the answer."""
    figure, panels = new_panels(4.0, 3, sharey=True)
    shown: list[Any] = []
    for axes, way, label in zip(
        panels, ("filled", "shifted"), ("tokens of filler added", "positions shifted"), strict=False
    ):
        for place, (name, rows) in enumerate(figures["prompts"][way].items()):
            shown += _line(axes, figures["added_tokens"], rows, place, name if way == "filled" else None)
        axes.set(xlabel=label)
    groups = figures["responses"]
    for place, name in enumerate(figures["prompts"]["filled"]):
        _line(panels[2], [group["tokens"] for group in groups], [group["ways"][name] for group in groups], place, None)
    panels[2].set(xlabel="tokens of the answer")
    panels[2].locator_params(axis="x", integer=True)
    panels[0].set(ylabel="right answers (%)", ylim=(-3, 103))
    legend_above(figure, [one for one in shown if not one.get_label().startswith("_")])
    return figure


def _line(axes: "Axes", x: Sequence[float], rows: Sequence[dict[str, Any]], place: int, label: str | None) -> Any:
    colour = INK if place == 0 else COLOURS[place - 1]
    named = "alone" if label == "alone" else label and f"rope {label}"
    return axes.plot(
        x, [100 * one["accuracy"] for one in rows], marker=MARKERS[place], color=colour, label=named, markersize=5
    )


def _others(study: Study, asked: Sequence[Question], removed: str | None, fitted: int) -> dict[str, CacheToCache]:
    """The fusers to compare with, by what they are."""
    if removed is not None:
        fuser = load_fuser(removed, dtype=study.pair.fusers[0].dtype)
        if fuser.config.rope != "removed":
            raise AnalysisError(
                f"expected a fuser trained with fuser.rope=removed, got {fuser.config.rope!r}; name another folder"
            )
        return {
            "removed (trained)": CacheToCache(
                study.pair.receiver, study.pair.sharers, [fuser.to(study.pair.receiver.model.device)]
            )
        }
    texts = {str(one.prompt) for one in asked}
    unasked = [one for one in study.questions if str(one.prompt) not in texts] or list(asked)
    chosen = spread(replace(study, questions=unasked), fitted)
    ropes = [
        rope for rope in ROPES if rope == "kept" or all(map(turns_keys, (study.pair.receiver, *study.pair.sharers)))
    ]
    return {f"{rope} (ridge)": fit_ridge(study, chosen, rope) for rope in ropes}


def _caches(pair: CacheToCache, fuser: Fuser, batch: Sequence[Question]) -> Any:
    """Both models' caches of the tokens that are fused, as the fuser sees them."""
    tokens = pair.fuser_inputs(stack([pair.align(one.prompt) for one in batch]), like=next(fuser.parameters()))
    return None if tokens is None else (tokens.receiver, tokens.sharer)


def _ask(
    study: Study, pair: CacheToCache, questions: Sequence[Question], shifted: int, fused: bool = True
) -> np.ndarray:
    """``(2, questions)``, see :func:`judge`, in the order of the questions."""
    judged = np.zeros((2, len(questions)))
    order = sorted(range(len(questions)), key=lambda place: len(str(questions[place].prompt)))
    for start in range(0, len(order), study.batch_size):
        places = order[start : start + study.batch_size]
        readings = [pair.align(questions[place].prompt) for place in places]
        prompt = shift(stack(readings), shifted)
        streams = pair.read(prompt, 1 if fused else 0)
        kv = read_cache(streams.receiver)
        if fused:
            kv = pair.fuse_kv(prompt=prompt, receiver=kv, sharers=list(map(read_cache, streams.sharers)))
        judged[:, places] = judge(
            pair, readings, prompt, streams.receiver, kv, [str(questions[place].answer) for place in places]
        )
    return judged


def _fill(receiver: LanguageModel, question: Question, filler: str, count: int) -> Question:
    """The question behind as much filler as is so many of the receiver's tokens, the last sentence cut short."""
    if not count:
        return question
    ids = receiver.tokenizer(filler * count, add_special_tokens=False).input_ids[
        : count - 1
    ]  # a space is one more, or none
    return replace(question, prompt=_before(question.prompt, receiver.tokenizer.decode(ids).strip() + " "))


def _before(prompt: Prompt, text: str) -> Prompt:
    *others, last = as_chat(prompt)
    return [*others, {**last, "content": text + last["content"]}]


def _room(pair: CacheToCache, questions: Sequence[Question]) -> int:
    """Tokens that can be added to every prompt and its answer in every model's context."""
    models = pair.receiver, *pair.sharers
    rooms = [
        model.context
        - max(len(tokenize(one.prompt, model.tokenizer).ids) + _answer_length(model, one) for one in questions)
        for model in models
        if model.context is not None
    ]
    return max(0, min(rooms, default=2**20))


def _answer_length(model: LanguageModel, question: Question) -> int:
    return 1 + len(model.tokenizer(str(question.answer), add_special_tokens=False).input_ids)


def _by_response(
    study: Study, asked: Sequence[Question], alone: np.ndarray, fused: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """By tokens of the answer, everything at no added length."""
    receiver = study.pair.receiver.tokenizer
    lengths = np.array(
        [len(tokenize_response(study.pair.align(one.prompt), str(one.answer), receiver).ids) for one in asked]
    )
    groups = []
    for length in sorted(set(lengths.tolist())):
        mine = np.flatnonzero(lengths == length)
        some = [asked[place] for place in mine.tolist()]
        ways = {"alone": _figures(alone[:, mine], alone[:, mine], some)}
        groups.append(
            {
                "tokens": length,
                "ways": ways | {name: _figures(one[:, mine], alone[:, mine], some) for name, one in fused.items()},
            }
        )
    return groups


def _figures(judged: np.ndarray, alone: np.ndarray, questions: Sequence[Question]) -> dict[str, float | Interval | int]:
    """Accuracy, and what is gained over the receiver alone: in accuracy, and in nats of the right answer."""
    groups = [one.group or str(place) for place, one in enumerate(questions)]
    gain, interval = bootstrap_mean((judged - alone)[0], groups)
    nats = float((judged - alone)[1].mean())
    return {
        "questions": len(groups),
        "accuracy": float(judged[0].mean()),
        "gain": gain,
        "interval": interval,
        "nats": nats,
    }
