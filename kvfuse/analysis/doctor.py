"""``kvfuse doctor``: is this pair well? Every check is made on the loaded models, and says what it saw."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from kvfuse.analysis.readout import spread
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError, KVFuseError
from kvfuse.fusers import describe_gates
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedPrompt, stack
from kvfuse.prompts.chat import Prompt
from kvfuse.prompts.view import view
from kvfuse.stages.phases import measured

SAMPLE = 8
NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
LEAST_COVERAGE = 0.9
LEAST_FUSED = 0.5
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of logits, relative to the largest: the same sums in another order."""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: What was looked at.
        seen: What was seen.
        well: Whether it is as it must be.
    """

    name: str
    seen: str
    well: bool = True


def sample_of(fuser: Sequence[str] = (), receiver: str | None = None, sharer: Sequence[str] = ()) -> Study:
    """The user's own pair, else the embedded one, with questions that any pair can read.

    Raises:
        AnalysisError: Models without a fuser.
    """
    if not fuser and (receiver or sharer):
        raise AnalysisError(
            "expected --fuser for a pair of your own, got models without one; name the fuser's folder or Hub id"
        )
    embedded = Study.embedded(SAMPLE)
    if not fuser:
        return embedded
    return replace(
        embedded, pair=CacheToCache.from_pretrained(receiver, list(sharer) or None, list(fuser), device_map="auto")
    )


def examine(study: Study) -> list[Check]:
    """Look at a pair and let it read a few prompts.

    Args:
        study: The pair, with prompts; answers are not needed.
    """
    prompts = [one.prompt for one in spread(study, SAMPLE)]
    return [
        check
        for part in (_models, _fusers, _alignment, _closed_gates, _fused, _costs)
        for check in _told(part, study.pair, prompts)
    ]


def table(checks: Sequence[Check]) -> Table:
    """The checks for a terminal."""
    out = Table("", "check", "what was seen", box=None, header_style="bold")
    for check in checks:
        out.add_row("ok" if check.well else "WRONG", check.name, check.seen, style=None if check.well else "bold red")
    return out


def verdict(checks: Sequence[Check]) -> str:
    """One line."""
    wrong = [check.name for check in checks if not check.well]
    return f"wrong: {', '.join(wrong)}" if wrong else f"all {len(checks)} checks passed"


class _Closed(nn.Module):
    """A fuser whose residual is what closed gates make of it."""

    def __init__(self, fuser: nn.Module) -> None:
        super().__init__()
        self.fuser = fuser

    def forward(self, receiver: KV, sharer: KV) -> KV:
        residual = self.fuser(receiver=receiver, sharer=sharer)
        return KV(residual.key * 0, residual.value * 0)


def _told(part: Callable[..., Iterator[Check]], pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """The checks of a part; what kvfuse refuses is a check that failed."""
    try:
        with torch.no_grad():
            yield from part(pair, prompts)
    except KVFuseError as error:
        yield Check(part.__name__.strip("_").replace("_", " "), str(error), well=False)


def _models(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    for name, model in _named(pair):
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
        seen = f"{model.name}: {model.kv_spec}, {parameters:,} parameters, {model.identity.dtype}, context {model.context or 'not told'}"
        finite = all(
            bool(parameter.isfinite().all()) for parameter in model.model.parameters() if parameter.is_floating_point()
        )
        yield Check(name, seen if finite else f"{seen}; weights that are no numbers", finite)
    receiver = pair.receiver.identity.tokenizer
    for name, model in _named(pair)[1:]:
        same = "the same as" if model.identity.tokenizer == receiver else "another than"
        yield Check(
            f"tokenizer of the {name}",
            f"{same} the receiver's: {len(model.tokenizer):,} and {len(pair.receiver.tokenizer):,} tokens",
        )


def _fusers(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    for number, fuser in enumerate(pair.fusers):
        config, parameters = fuser.config, sum(parameter.numel() for parameter in fuser.parameters())
        kind = config.model_type.removeprefix("kvfuse-") + ("" if config.weights == "full" else f" as {config.weights}")
        seen = f"{kind}, {parameters:,} parameters, trained for these two models; layers {config.layers}"
        finite = all(bool(parameter.isfinite().all()) for parameter in fuser.parameters())
        yield Check(
            _numbered("fuser", pair, number),
            seen if finite else "weights that are no numbers; train or download it again",
            finite,
        )
        opened = fuser.open_gates().values()
        some = not opened or any(bool(gate.any()) for gate in opened)
        yield Check(
            _numbered("gates", pair, number),
            describe_gates(fuser) + ("" if some else " Nothing is fused; train it longer."),
            some,
        )


def _alignment(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    for number, (sharer, fuser) in enumerate(zip(pair.sharers, pair.fusers, strict=True)):
        how, fuse = fuser.config.token_alignment, fuser.config.fuse
        seen = [view(prompt, pair.receiver.tokenizer, sharer.tokenizer, how, fuse) for prompt in prompts]
        fused = sum(int((one.reads >= 0).sum()) for one in seen) / sum(len(one.reads) for one in seen)
        kept = sum(int(one.kept.sum()) for one in seen) / max(1, sum(len(one.kept) for one in seen))
        told = f"{how}: {fused:.1%} of the receiver's tokens are fused, {kept:.1%} of the messages' characters are read by both"
        well = kept >= LEAST_COVERAGE and (fused >= LEAST_FUSED or fuse == "messages")
        yield Check(_numbered("alignment", pair, number), told if well else f"{told}; see 'kvfuse align'", well)


def _closed_gates(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """With every gate closed the receiver must answer as if it were alone."""
    tokens, apart, largest = 0, 0.0, 1e-9
    for prompt in prompts:
        batch = stack([pair.align(prompt)])
        (shut, logits), (alone, others) = _generate(pair, batch, list(map(_Closed, pair.fusers))), _alone(pair, batch)
        tokens += int(not torch.equal(shut, alone))
        if shut.shape == alone.shape:
            apart, largest = max(apart, float((logits - others).abs().max())), max(largest, float(others.abs().max()))
    tolerance = TOLERANCES.get(pair.receiver.model.dtype, 1e-2)
    well = tokens == 0 and apart <= tolerance * largest
    equal = f"{len(prompts) - tokens} of {len(prompts)} answers equal the receiver's, token by token"
    yield Check("gates closed = receiver alone", f"{equal}; logits differ by {apart:.1e} of {largest:.1f}", well)


def _fused(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """What is fused must be numbers, and change something."""
    changed, finite = 0, True
    for prompt in prompts:
        batch = stack([pair.align(prompt)])
        (fused, logits), (alone, others) = _generate(pair, batch), _alone(pair, batch)
        changed += int(not torch.equal(fused, alone))
        finite &= bool(logits.isfinite().all()) and bool(others.isfinite().all())
    seen = f"{changed} of {len(prompts)} answers differ from the receiver's, in the first {NEW_TOKENS} tokens"
    yield Check(
        "fused answers", seen if finite else "logits that are no numbers; load the models in another dtype", finite
    )


def _costs(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    parts = [model.model for _, model in _named(pair)] + list(pair.fusers)
    held = sum(parameter.numel() * parameter.element_size() for part in parts for parameter in part.parameters())
    by_token = sum(_token_bytes(model) for _, model in _named(pair))
    yield Check(
        "memory", f"{_size(held)} of weights; {_size(by_token)} of caches for each prompt token, all models together"
    )
    batch = stack([pair.align(prompts[0])])
    _generate(pair, batch)  # the first is slow
    start = time.perf_counter()
    with measured() as stopwatch:
        _generate(pair, batch)
    total = time.perf_counter() - start
    phases = ", ".join(f"{name.replace('_', ' ')} {1000 * seconds:.0f}" for name, seconds in stopwatch.seconds.items())
    yield Check(
        "time",
        f"{1000 * total:.0f} ms for {batch.ids.shape[1]} prompt tokens and up to {NEW_TOKENS} new ones ({phases})",
    )


def _generate(
    pair: CacheToCache, batch: AlignedPrompt, fusers: Sequence[nn.Module] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a greedy answer ``(1, T + new)``, and the logits they were chosen by ``(new, V)`` float32."""
    return _traced(pair.answer(batch, fusers=fusers, **GREEDY))


def _alone(pair: CacheToCache, batch: AlignedPrompt) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the receiver's own ``generate``, which is given no cache."""
    return _traced(pair.decode(batch, None, **GREEDY))


def _traced(out: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return out.sequences.cpu(), torch.cat(out.logits).float().cpu()


def _named(pair: CacheToCache) -> list[tuple[str, LanguageModel]]:
    return [
        ("receiver", pair.receiver),
        *((_numbered("sharer", pair, number), one) for number, one in enumerate(pair.sharers)),
    ]


def _numbered(name: str, pair: CacheToCache, number: int) -> str:
    return name if len(pair.sharers) == 1 else f"{name} {number}"


def _token_bytes(model: LanguageModel) -> int:
    spec = model.kv_spec
    return spec.num_layers * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * model.model.dtype.itemsize


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
