"""The verdict: a task's figures in words."""

from collections.abc import Sequence
from typing import Any

from kvfuse.evaluation.scoring.statistics import MIN_ITEMS

RECEIVER, SHARER, FUSED, MISMATCHED, CALIBRATED = "receiver", "sharer", "cache-to-cache", "mismatched", "calibrated"
"""Methods that figures and sentences refer to by name."""


def points(figure: float, interval: Sequence[float], signed: bool = False) -> str:
    """Returns a share with its interval in percent, or in points: ``3.1 [1.9, 4.2]``."""
    form = "+z.1f" if signed else "z.1f"  # z: no negative zero
    low, high = (format(100 * end, form) for end in interval)
    return f"{format(100 * figure, form)} [{low}, {high}]"


def verdict(figures: dict[str, Any]) -> str:
    """Returns whether the fused receiver beats the receiver alone, and which part of that is communication.

    Args:
        figures: Of one task, from :func:`kvfuse.evaluation.scoring.metrics.task_figures`.
    """
    # 1) without these two methods there is nothing to claim
    gain = difference(figures, FUSED, RECEIVER)
    if gain is None:
        return f"No verdict: it takes answers of both {FUSED} and {RECEIVER} to the same items."
    # 2) the gain with its content, if there are enough items for one; then the facts that qualify it
    calibrated = _calibrated(difference(figures, FUSED, CALIBRATED))
    claim = _gain(gain, figures["content"]) if gain["items"] >= MIN_ITEMS else _too_few(gain)
    sentences = [claim, calibrated, _kept(figures), _seeds(figures)]
    return " ".join(filter(None, sentences))


def difference(figures: dict[str, Any], method: str, against: str) -> dict[str, Any] | None:
    """Returns the pair of two methods as ``method`` minus ``against``; None where they were not compared."""
    for pair in figures["pairs"]:
        if (pair["method"], pair["against"]) == (method, against):
            return pair
        if (pair["method"], pair["against"]) == (against, method):  # swap the two
            low, high = pair["interval"]
            swapped = {"method": method, "against": against, "helped": pair["hurt"], "hurt": pair["helped"]}
            return {**pair, **swapped, "difference": -pair["difference"], "interval": (-high, -low)}
    return None


def _too_few(gain: dict[str, Any]) -> str:
    shown = points(gain["difference"], gain["interval"], signed=True)
    return f"No verdict from {gain['items']:,} items, which takes {MIN_ITEMS}: {shown} points against the receiver."


def _gain(gain: dict[str, Any], content: dict[str, Any] | None) -> str:
    difference, (low, high) = gain["difference"], gain["interval"]
    if low > 0:
        return f"The gain over the receiver is {points(difference, (low, high))} points; {_part(gain, content)}"
    if high < 0:
        lost = points(-difference, (-high, -low))
        return f"Fusing loses {lost} points against the receiver alone. {_content(content)}"
    shown = points(difference, (low, high), signed=True)
    return f"No gain over the receiver can be shown: {shown} points on {gain['items']:,} items. {_content(content)}"


def _part(gain: dict[str, Any], content: dict[str, Any] | None) -> str:
    """Returns which part of a gain needs the sharer to have read this question."""
    if content is None:
        return f"which part of it is communication is unknown, since there is no {MISMATCHED} control."
    # the content is a difference to the control, so it can be anything from harmful to more than the gain
    worth, (low, high) = content["difference"], content["interval"]
    shown = points(worth, (low, high), signed=low <= 0)
    if low <= 0 <= high:
        return f"no part of it can be shown to need the sharer to have read this question ({shown} points)."
    if high < 0:
        return (
            "none of it needs the sharer to have read this question: "
            f"with another question's cache the receiver does better ({shown})."
        )
    if worth >= content["gain"]["difference"]:
        return (
            "all of it needs the sharer to have read this question, "
            f"which is worth {shown} points against having read another."
        )
    share = "" if content["share_of_gain"] is None else f" ({100 * content['share_of_gain']:.0f}%)"
    return f"{shown} of it{share} needs the sharer to have read this question."


def _content(content: dict[str, Any] | None) -> str:
    """Returns whether the sharer's input matters, where there is no gain to split."""
    if content is None:
        return f"There is no {MISMATCHED} control."
    # signed, since zero may lie within the interval
    low, high = content["interval"]
    shown = f"{points(content['difference'], (low, high), signed=True)} points"
    if low > 0:
        return (
            f"What the sharer read does reach the receiver: this question's cache is worth {shown} against another's."
        )
    if high < 0:
        return f"This question's cache does worse than another's: {shown}."
    return f"Nor can it be shown that it matters which question the sharer read: {shown}."


def _calibrated(gain: dict[str, Any] | None) -> str:
    if gain is None:
        return ""
    shown = points(gain["difference"], gain["interval"], signed=True)
    return f"Against the receiver with its preference for answer letters removed, the difference is {shown} points."


def _kept(figures: dict[str, Any]) -> str:
    kept = figures["methods"][FUSED]["kept"].items()
    shares = [f"{points(of['share'], of['interval'])}% of what the {name} alone has right" for name, of in kept]
    return f"Fused, it keeps {' and '.join(shares)}." if shares else ""


def _seeds(figures: dict[str, Any]) -> str:
    # a single seed has no range
    seeds = list(figures["methods"][FUSED]["seeds"].values())
    if len(seeds) < 2:
        return ""
    return f"The accuracies of {len(seeds)} fuser seeds lie between {100 * min(seeds):.1f} and {100 * max(seeds):.1f}."
