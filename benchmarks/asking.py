"""Time to the first and to the eighth token: the receiver alone, Cache-to-Cache and text-to-text on the same prompt."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.fusing import bare_products
from benchmarks.machine import Work
from benchmarks.rows import Row
from benchmarks.timing import in_turns, least, ratio, timed, total
from kvfuse.fusers import Fuser, quantize
from kvfuse.language_model import LanguageModel
from kvfuse.stages.phases import measured

PHASES = {
    "receiver_prefill": "receiver prefill",
    "sharer_prefill": "sharer prefill",
    "fuse": "fuse",
    "first_token": "last prompt token",
}
"""Phase of :mod:`kvfuse.stages.phases` -> figure, of everything up to the first token."""
NEW_TOKENS, HINT_TOKENS, REQUEST_TOKENS = 8, 64, 48
"""Length of an answer, of a hint, and of the words that ask for the hint."""
MAX_BARE_TOKENS = 256
"""Bare products of longer prompts take minutes and have the same ratio."""


def greedy(new: int) -> dict[str, Any]:
    """Options of ``generate`` for exactly ``new`` tokens."""
    return {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}


@torch.no_grad()
def generate(model: LanguageModel, ids: Tensor, new: int, **options: Any) -> Tensor:
    """Run transformers' own ``generate`` as its users call it."""
    ids = ids.to(model.model.device)  # (B, T)
    return model.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **greedy(new), **options)


class PhasedAnswer:
    """The first token of Cache-to-Cache, timed as a whole and by phase.

    Attributes:
        phases: Seconds of every run so far, by the keys of :data:`PHASES`.
    """

    def __init__(self, case: Case, fuser: Fuser) -> None:
        self.case, self.fuser = case, fuser
        self.phases: dict[str, list[float]] = defaultdict(list)

    def __call__(self) -> float:
        with measured() as stopwatch:
            taken = timed(self.case.pair.answer, self.case.prompt, fusers=[self.fuser], **greedy(1))
        # the stopwatch has more phases; an answer of one token has no decode
        for name in PHASES:
            self.phases[name].append(stopwatch.seconds[name])
        return taken


@torch.no_grad()
def first_token_rows(case: Case) -> Iterator[Row]:
    """Cache-to-Cache with the pair's fuser and with a small one, the receiver alone, and the necessary parts."""
    # 1) All candidates take turns.
    c2c, small = PhasedAnswer(case, case.pair.fusers[0]), PhasedAnswer(case, case.low_rank)
    bare = bare_products(case) if case.tokens <= MAX_BARE_TOKENS else {}
    alone = partial(timed, generate, case.pair.receiver, case.prompt.ids, 1)
    taken = in_turns({"receiver": alone, "C2C": c2c, "low-rank": small, **bare}, case.repeats)
    # 2) Seconds by phase, and the share of the fuse that is arithmetic or transport.
    for name, figure in PHASES.items():
        yield case.timed_row(figure, c2c.phases[name], "s")
    work = Work.of_fusing(case.pair, case.prompt)
    yield case.row("arithmetic of a fuse", work.flops / 1e9, "GFLOP")
    yield case.row("bytes of a fuse", work.bytes / 1e6, "MB")
    of_roofline = [case.machine.seconds(work) / seconds for seconds in c2c.phases["fuse"]]
    yield case.timed_row("fuse, share of the roofline", of_roofline, "x")
    # 3) Seconds as a whole, and their ratios.
    for name in ("receiver", "C2C", "low-rank"):
        yield case.timed_row(f"first token, {name}", taken[name], "s")
    yield case.timed_row("first token / receiver's", ratio(taken["C2C"], taken["receiver"]), "x")
    yield case.timed_row("first token / receiver's, low-rank", ratio(taken["low-rank"], taken["receiver"]), "x")
    if bare:  # with the prefills of another run, so that an answer is not compared with its own parts
        products = least(*(taken[name] for name in bare))
        parts = total(small.phases["receiver_prefill"], small.phases["sharer_prefill"], products)
        figure = "first token / (receiver + sharer prefills + bare products)"
        yield case.timed_row(figure, ratio(taken["C2C"], parts), "x")


@torch.no_grad()
def end_to_end_rows(case: Case) -> Iterator[Row]:
    """To the eighth token; text-to-text with a hint of 64 tokens. Its texts are random ids, which cost the same.

    As :class:`kvfuse.methods.TextToText` and the reference do it: the sharer is asked for a hint about the question,
    and the receiver reads this request and the hint as two turns before the question.
    """
    pair, prompt = case.pair, case.prompt
    # 1) All candidates take turns.
    fusers = {"C2C": pair.fusers[0], "C2C, low-rank": case.low_rank, "C2C, int8": quantize(pair.fusers[0], "int8")}
    runs = {"receiver alone": partial(timed, generate, pair.receiver, prompt.ids, NEW_TOKENS)}
    runs |= {
        name: partial(timed, pair.answer, prompt, fusers=[fuser], **greedy(NEW_TOKENS))
        for name, fuser in fusers.items()
    }
    runs["text-to-text"] = partial(timed, _text_to_text, case)
    taken = in_turns(runs, case.repeats)
    # 2) Seconds, and ratios to text-to-text and to the receiver alone.
    for name, seconds in taken.items():
        yield case.timed_row(f"{NEW_TOKENS} tokens, {name}", seconds, "s")
    figure = f"C2C to {NEW_TOKENS} tokens"
    for name in fusers:
        over_text = f"{figure} / text-to-text{name.removeprefix('C2C')}"
        yield case.timed_row(over_text, ratio(taken[name], taken["text-to-text"]), "x")
    yield case.timed_row(f"{figure} / receiver alone", ratio(taken["C2C"], taken["receiver alone"]), "x")


def _text_to_text(case: Case) -> Tensor:
    question = case.prompt.ids  # (B, T); its first ids stand for the words of the request
    asked = torch.cat([question[:, :REQUEST_TOKENS], question], dim=1)
    with_hint = generate(case.pair.sharers[0], asked, HINT_TOKENS).cpu()
    return generate(case.pair.receiver, torch.cat([with_hint, question], dim=1), NEW_TOKENS)
