"""``kvfuse doctor``: is this pair well? Checks are made on the loaded models; each reports what it saw."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from kvfuse.analysis.layers import FusedLayers
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError, KVFuseError
from kvfuse.fusers import describe_gates
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import stack
from kvfuse.prompts.messages import Prompt
from kvfuse.prompts.view import view
from kvfuse.stages.phases import measured

NUM_PROMPTS = 8
NEW_TOKENS = 8
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
MIN_COVERAGE = 0.9
"""Share of the messages' characters that both models must read."""
MIN_FUSED = 0.5
"""Share of the receiver's tokens that must be fused, where all may be."""
NOT_FINITE = "weights that are not finite"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of logits, relative to the largest: the same sums in another order."""


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: What was checked.
        seen: The observation.
        well: Whether it is as it must be.
    """

    name: str
    seen: str
    well: bool = True


Part = Callable[[CacheToCache, Sequence[Prompt]], Iterator[Check]]


def sample_of(fuser: Sequence[str] = (), receiver: str | None = None, sharer: Sequence[str] = ()) -> Study:
    """Returns the user's own pair, else the embedded one, with questions that any pair can read.

    Raises:
        AnalysisError: Models without a fuser.
    """
    if not fuser and (receiver or sharer):
        raise AnalysisError(
            "expected --fuser for a pair of your own, got models without one; name the fuser's folder or Hub id"
        )
    embedded = Study.embedded(NUM_PROMPTS)
    if not fuser:
        return embedded
    pair = CacheToCache.from_pretrained(receiver, list(sharer) or None, list(fuser), device_map="auto")
    return replace(embedded, pair=pair)


def examine(study: Study) -> list[Check]:
    """Check a pair, also on a few prompts.

    Args:
        study: The pair, with prompts; answers are not needed.
    """
    prompts = [question.prompt for question in study.spread(NUM_PROMPTS).questions]
    parts = (_models, _fusers, _alignment, _closed_gates, _fused, _costs)
    return [check for part in parts for check in _run(part, study.pair, prompts)]


def table(checks: Sequence[Check]) -> Table:
    """Returns the checks as a table for a terminal."""
    out = Table("", "check", "what was seen", box=None, header_style="bold")
    for check in checks:
        out.add_row("ok" if check.well else "WRONG", check.name, check.seen, style=None if check.well else "bold red")
    return out


def verdict(checks: Sequence[Check]) -> str:
    """Returns one line: the failed checks, or that all passed."""
    wrong = [check.name for check in checks if not check.well]
    return f"wrong: {', '.join(wrong)}" if wrong else f"all {len(checks)} checks passed"


def _run(part: Part, pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """The checks of a part; an error that kvfuse raises is a failed check."""
    try:
        with torch.no_grad():
            yield from part(pair, prompts)
    except KVFuseError as error:
        yield Check(part.__name__.strip("_").replace("_", " "), str(error), well=False)


def _models(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """Sizes, finite weights and tokenizers."""
    models = _models_by_name(pair)
    for name, model in models.items():
        size = f"{model.kv_spec}, {model.model.num_parameters():,} parameters, {model.identity.dtype}"
        seen = f"{model.name}: {size}, context {model.context or 'unknown'}"
        finite = _is_finite(model.model)
        yield Check(name, seen if finite else f"{seen}; {NOT_FINITE}", finite)
    # different tokenizers are no fault: the alignment is checked below
    receiver = models.pop("receiver")
    for name, sharer in models.items():
        same = "the same as" if sharer.identity.tokenizer == receiver.identity.tokenizer else "another than"
        sizes = f"{len(sharer.tokenizer):,} and {len(receiver.tokenizer):,} tokens"
        yield Check(f"tokenizer of the {name}", f"{same} the receiver's: {sizes}")


def _fusers(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """Finite weights, and at least one open gate."""
    for number, fuser in enumerate(pair.fusers):
        config = fuser.config
        kind = config.model_type.removeprefix("kvfuse-") + ("" if config.weights == "full" else f" as {config.weights}")
        seen = f"{kind}, {fuser.num_parameters():,} parameters, trained for these two models; layers {config.layers}"
        finite = _is_finite(fuser)
        problem = f"{NOT_FINITE}; train or download it again"
        yield Check(_numbered("fuser", pair, number), seen if finite else problem, finite)
        # with every gate closed the pair is the receiver
        gates = fuser.open_gates().values()
        is_open = not gates or any(bool(gate.any()) for gate in gates)
        seen = describe_gates(fuser) + ("" if is_open else " Nothing is fused; train it longer.")
        yield Check(_numbered("gates", pair, number), seen, is_open)


def _alignment(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """Enough tokens are fused, and enough of the messages is read by both models."""
    for number, (sharer, fuser) in enumerate(zip(pair.sharers, pair.fusers, strict=True)):
        strategy, fuse = fuser.config.token_alignment, fuser.config.fuse
        # shares over all prompts: of tokens, then of characters
        views = [view(prompt, pair.receiver.tokenizer, sharer.tokenizer, strategy, fuse) for prompt in prompts]
        fused = sum(int((shown.reads >= 0).sum()) for shown in views) / sum(len(shown.reads) for shown in views)
        kept = sum(int(shown.kept.sum()) for shown in views) / max(1, sum(len(shown.kept) for shown in views))
        tokens = f"{fused:.1%} of the receiver's tokens are fused"
        seen = f"{strategy}: {tokens}, {kept:.1%} of the messages' characters are read by both"
        well = kept >= MIN_COVERAGE and (fused >= MIN_FUSED or fuse == "messages")
        yield Check(_numbered("alignment", pair, number), seen if well else f"{seen}; see 'kvfuse align'", well)


def _closed_gates(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """With every gate closed the receiver must answer as it does alone."""
    closed = FusedLayers(pair, []).fusers
    equal, difference, largest = 0, 0.0, 1e-9
    for same, logits, own in (_answer(pair, prompt, closed) for prompt in prompts):
        equal += same
        # answers of different lengths are unequal anyway
        if logits.shape == own.shape:
            difference = max(difference, float((logits - own).abs().max()))
            largest = max(largest, float(own.abs().max()))
    tolerance = TOLERANCES.get(pair.receiver.model.dtype, 1e-2) * largest
    answers = f"{equal} of {len(prompts)} answers equal the receiver's, token by token"
    seen = f"{answers}; logits differ by {difference:.1e} of {largest:.1f}"
    yield Check("gates closed = receiver alone", seen, equal == len(prompts) and difference <= tolerance)


def _fused(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """Fused logits must be finite; the number of answers that change is reported."""
    answers = [_answer(pair, prompt) for prompt in prompts]
    changed = sum(not same for same, *_ in answers)
    finite = all(bool(part.isfinite().all()) for _, *logits in answers for part in logits)
    seen = f"{changed} of {len(prompts)} answers differ from the receiver's, in the first {NEW_TOKENS} tokens"
    problem = "logits that are not finite; load the models in another dtype"
    yield Check("fused answers", seen if finite else problem, finite)


def _costs(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """Memory and time."""
    models = _models_by_name(pair).values()
    parts = [*(model.model for model in models), *pair.fusers]
    held = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    caches = sum(map(_bytes_per_token, models))
    seen = f"{_size(held)} of weights; {_size(caches)} of caches for each prompt token, all models together"
    yield Check("memory", seen)
    # the time of a short answer, by phase
    batch = stack([pair.align(prompts[0])])
    pair.answer(batch, **GREEDY)  # warm-up
    start = time.perf_counter()
    with measured() as stopwatch:
        pair.answer(batch, **GREEDY)
    total = time.perf_counter() - start
    phases = ", ".join(f"{name.replace('_', ' ')} {1000 * seconds:.0f}" for name, seconds in stopwatch.seconds.items())
    tokens = f"{batch.ids.shape[1]} prompt tokens and up to {NEW_TOKENS} new ones"
    yield Check("time", f"{1000 * total:.0f} ms for {tokens} ({phases})")


def _answer(
    pair: CacheToCache, prompt: Prompt, fusers: Sequence[nn.Module] | None = None
) -> tuple[bool, Tensor, Tensor]:
    """Answer a prompt greedily from its fused cache, and with the receiver's own ``generate``.

    Returns:
        Whether the tokens of both are equal, and the logits that chose each answer, ``(new, V)`` float32.
    """
    batch = stack([pair.align(prompt)])  # (1, T)
    fused, alone = pair.answer(batch, fusers=fusers, **GREEDY), pair.decode(batch, None, **GREEDY)
    logits, own = (torch.cat(out.logits).float().cpu() for out in (fused, alone))
    return torch.equal(fused.sequences, alone.sequences), logits, own


def _models_by_name(pair: CacheToCache) -> dict[str, LanguageModel]:
    sharers = {_numbered("sharer", pair, number): sharer for number, sharer in enumerate(pair.sharers)}
    return {"receiver": pair.receiver, **sharers}


def _numbered(name: str, pair: CacheToCache, number: int) -> str:
    return name if len(pair.sharers) == 1 else f"{name} {number}"


def _is_finite(module: nn.Module) -> bool:
    return all(bool(weight.isfinite().all()) for weight in module.parameters() if weight.is_floating_point())


def _bytes_per_token(model: LanguageModel) -> int:
    spec = model.kv_spec
    return spec.num_layers * spec.num_kv_heads * (spec.key_dim + spec.value_dim) * model.model.dtype.itemsize


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
