"""The methods in words, for ``kvfuse list methods``: read without importing them, which loads torch."""

from importlib.metadata import entry_points

DESCRIPTIONS = {
    "receiver": "the receiver alone",
    "sharer": "the sharer alone",
    "few-shot": "the receiver, after examples",
    "text-to-text": "the receiver, after a hint that the sharer writes",
    "routing": "one of the two models, chosen by the question",
    "cascade": "one of the two models, chosen by the receiver's confidence",
    "cache-to-cache": "the receiver, with the sharer's cache fused into its own",
    "hybrid": "the same, after reading a hint of the sharer",
    "zeroed": "control: the sharer's cache is zero",
    "mismatched": "control: the sharer reads another question",
    **{f"deranged-{seed}": f"control: another question of the whole run, bijection {seed}" for seed in (1, 2, 3)},
    "adapter-only": "control: the mean of the fuser's output over five other questions",
    "moment-matched": "control: noise with mean and covariance of the sharer's cache",
    "shuffled": "control: the sharer's positions are shuffled",
    "random-fuser": "control: a fuser with random weights",
    "projected-only": "control: the receiver's cache is removed",
    "calibrated": "control: the receiver without its letter bias",
}
"""Name -> what answers; the built-in methods."""


def lines() -> list[str]:
    """Returns a line for each method, also those that installed packages offer."""
    offered = {point.name: f"from {point.module}" for point in entry_points(group="kvfuse.methods")}
    return [f"{name:<16}{what}" for name, what in (DESCRIPTIONS | offered).items()]
