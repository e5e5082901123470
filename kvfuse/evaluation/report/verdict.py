"""What a task's figures say, in words."""

from collections.abc import Sequence
from typing import Any

RECEIVER, SHARER, FUSED, MISMATCHED, CALIBRATED = "receiver", "sharer", "cache-to-cache", "mismatched", "calibrated"
"""Methods that figures and sentences know by name."""


def points(figure: float, interval: Sequence[float], signed: bool = False) -> str:
    """A share with its interval in percent, or in points: ``3.1 [1.9, 4.2]``."""
    form = "+z.1f" if signed else "z.1f"  # z: never a negative zero
    low, high = (format(100 * end, form) for end in interval)
    return f"{format(100 * figure, form)} [{low}, {high}]"


def verdict(figures: dict[str, Any]) -> str:
    """Whether the fused receiver beats the receiver alone, and what part of that is communication.

    Args:
        figures: Of one task, from :func:`kvfuse.evaluation.scoring.metrics.task_figures`.
    """
    gain = difference(figures, FUSED, RECEIVER)
    if gain is None:
        return f"No verdict: it takes answers of both {FUSED} and {RECEIVER} to the same items."
    sentences = [
        _gain(gain, figures["content"]),
        _calibrated(difference(figures, FUSED, CALIBRATED)),
        _kept(figures),
        _seeds(figures),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def difference(figures: dict[str, Any], method: str, against: str) -> dict[str, Any] | None:
    """The pair of these two methods, turned so that it is ``method`` minus ``against``; None where they were not compared."""
    for pair in figures["pairs"]:
        if (pair["method"], pair["against"]) == (method, against):
            return pair
        if (pair["method"], pair["against"]) == (against, method):
            low, high = pair["interval"]
            turned = {
                "difference": -pair["difference"],
                "interval": (-high, -low),
                "helped": pair["hurt"],
                "hurt": pair["helped"],
            }
            return {**pair, "method": method, "against": against, **turned}
    return None


def _gain(gain: dict[str, Any], content: dict[str, Any] | None) -> str:
    low, high = gain["interval"]
    if low > 0:
        return f"The gain over the receiver is {points(gain['difference'], gain['interval'])} points; {_part(gain, content)}"
    if high < 0:
        return f"Fusing loses {points(-gain['difference'], (-high, -low))} points against the receiver alone. {_content(content)}"
    told = points(gain["difference"], gain["interval"], signed=True)
    return f"No gain over the receiver can be told from zero: {told} points on {gain['items']:,} items. {_content(content)}"


def _part(gain: dict[str, Any], content: dict[str, Any] | None) -> str:
    """What part of a gain needs the sharer to have read this question."""
    if content is None:
        return f"what part of it is communication is not known, for no {MISMATCHED} control was run."
    worth, (low, high) = content["difference"], content["interval"]
    told = points(worth, (low, high), signed=low <= 0)
    if low <= 0 <= high:
        return f"no part of it can be shown to need the sharer to have read this question ({told} points)."
    if high < 0:
        return f"none of it needs the sharer to have read this question: with another question's cache the receiver does better ({told})."
    if worth >= content["gain"]["difference"]:
        return f"all of it needs the sharer to have read this question, which is worth {told} points against having read another."
    share = "" if content["share_of_gain"] is None else f" ({100 * content['share_of_gain']:.0f}%)"
    return f"{told} of it{share} needs the sharer to have read this question."


def _content(content: dict[str, Any] | None) -> str:
    """Whether the sharer's reading matters, where there is no gain to split."""
    if content is None:
        return f"No {MISMATCHED} control was run."
    low, high = content["interval"]
    told = f"{points(content['difference'], (low, high), signed=True)} points"
    if low > 0:
        return f"What the sharer read does reach the receiver: this question's cache is worth {told} against another's."
    if high < 0:
        return f"This question's cache does worse than another's: {told}."
    return f"Nor does it show that it matters which question the sharer read: {told}."


def _calibrated(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    told = points(gain["difference"], gain["interval"], signed=True)
    return f"Against the receiver with its preference for answer letters removed, the difference is {told} points."


def _kept(figures: dict[str, Any]) -> str:
    kept = figures["methods"][FUSED]["kept"]
    told = [
        f"{points(one['share'], one['interval'])}% of what the {name} alone has right" for name, one in kept.items()
    ]
    return f"Fused, it keeps {' and '.join(told)}." if told else ""


def _seeds(figures: dict[str, Any]) -> str:
    seeds = list(figures["methods"][FUSED]["seeds"].values())
    if len(seeds) < 2:
        return ""
    return f"The accuracies of {len(seeds)} fuser seeds lie between {100 * min(seeds):.1f} and {100 * max(seeds):.1f}."
