"""Synthetic predictions, for whatever reads them."""

from kvfuse.evaluation.predictions import Prediction, Run, Timing


def answers(method, scores, *, task="t", groups=None, seed=None, **fields):
    """One prediction an item, ``None`` where it is not answered yet."""
    return [
        Prediction(
            task=task,
            item=str(i),
            method=method,
            seed=seed,
            prompt_hash=str(i),
            answer=f"{method} says {score}",
            extracted="A",
            target="A",
            score=score,
            group=None if groups is None else groups[i],
            **{name: value[i] if isinstance(value, list) else value for name, value in fields.items()},
        )
        for i, score in enumerate(scores)
        if score is not None
    ]


def run_of(*answers, **fields):
    return Run(name="run", predictions=[row for some in answers for row in some], **fields)


def timings(method, seconds, phases=None):
    return [
        Timing(
            task="t",
            item=str(i),
            method=method,
            seconds=one,
            tokens_in=10,
            tokens=i,
            phases={k: v * one for k, v in (phases or {}).items()},
        )
        for i, one in enumerate(seconds)
    ]
