"""``kvfuse doctor``: is this pair well? Checks are made on the loaded models; each reports what it saw."""

import copy
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfuse.analysis.layers import FusedLayers
from kvfuse.analysis.study import Question, Study
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.score import held_out
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
INDENT = 37
"""Columns of a line before what was seen: those of the mark and of the longest name."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of logits, relative to the largest: the same sums in another order."""


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        name: What was checked.
        seen: The observation.
        well: Whether it is as it must be.
    """

    name: str
    seen: str
    well: bool = True


Part = Callable[[CacheToCache, Sequence[Prompt]], Iterator[Check]]
Say = Callable[[str], Any]


def sample_of(
    fuser: Sequence[str] = (), receiver: str | None = None, sharer: Sequence[str] = (), **model_options: Any
) -> Study:
    """Returns the user's own pair, else the embedded one, with questions that any pair can read.

    Args:
        fuser: Folder or Hub id, one per sharer.
        receiver: By default the one that the fuser names.
        sharer: By default those that the fusers name.
        model_options: For the user's own pair, as in :meth:`CacheToCache.from_pretrained`.

    Raises:
        AnalysisError: Models without a fuser.
    """
    if not fuser and (receiver or sharer):
        raise AnalysisError(
            "expected --fuser for a pair of your own, got models without one; name the fuser's folder or Hub id"
        )
    if not fuser:
        return Study.embedded(NUM_PROMPTS)
    questions = [Question(item.text) for item in held_out(PairFolder(), NUM_PROMPTS)]
    return Study(CacheToCache.from_pretrained(receiver, list(sharer) or None, list(fuser), **model_options), questions)


def examine(study: Study, say: Say = lambda line: None) -> Iterator[Check]:
    """Check a pair, also on a few prompts.

    Args:
        study: The pair, with prompts; answers are not needed.
        say: Receives lines about what is checked next.

    Yields:
        The checks, each as soon as it is made.
    """
    prompts = [question.prompt for question in study.spread(NUM_PROMPTS).questions]
    answers = f"answers to {len(prompts)} prompts: the receiver alone, with closed gates, and fused"
    parts: dict[str, Part] = {
        "models": _models,
        "fusers": _fusers,
        "alignment": _alignment,
        answers: _answers,
        "memory and time": _costs,
    }
    for name, part in parts.items():
        say(f"checking {name}")
        yield from _run(part, study.pair, prompts)


def line(check: Check) -> str:
    """Returns a check for a terminal: its mark, its name and what was seen, wrapped below itself."""
    head = f"{'ok' if check.well else 'WRONG':<7}{check.name:<{INDENT - 7}}"
    width = max(2 * INDENT, shutil.get_terminal_size().columns)
    return textwrap.fill(check.seen, width, initial_indent=head, subsequent_indent=" " * INDENT)


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


def _answers(pair: CacheToCache, prompts: Sequence[Prompt]) -> Iterator[Check]:
    """With every gate closed the receiver must answer as it does alone; fused, its logits must be finite."""
    closed = FusedLayers(pair, []).fusers
    equal, changed, is_finite, difference, largest = 0, 0, True, 0.0, 1e-9
    for prompt in prompts:
        (alone, own), (same, logits), (fused, new) = _answer(pair, prompt, closed)
        equal += torch.equal(alone, same)
        changed += not torch.equal(alone, fused)
        is_finite &= bool(own.isfinite().all() and new.isfinite().all())
        # answers of different lengths are unequal anyway
        if logits.shape == own.shape:
            difference = max(difference, float((logits - own).abs().max()))
            largest = max(largest, float(own.abs().max()))
    # 1) Closed
    tolerance = TOLERANCES.get(pair.receiver.model.dtype, 1e-2) * largest
    answers = f"{equal} of {len(prompts)} answers equal the receiver's, token by token"
    seen = f"{answers}; logits differ by {difference:.1e} of {largest:.1f}"
    yield Check("gates closed = receiver alone", seen, equal == len(prompts) and difference <= tolerance)
    # 2) Fused
    seen = f"{changed} of {len(prompts)} answers differ from the receiver's, in the first {NEW_TOKENS} tokens"
    problem = "logits that are not finite; load the models in another dtype"
    yield Check("fused answers", seen if is_finite else problem, is_finite)


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


def _answer(pair: CacheToCache, prompt: Prompt, closed: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Answer a prompt greedily with the receiver's own ``generate``, and from its cache with closed and own fusers.

    Returns:
        Of each answer the ids, ``(1, T + new)`` int64, and the logits that chose them, ``(new, V)`` float32.
    """
    batch = stack([pair.align(prompt)])  # (1, T)
    answers = [pair.decode(batch, None, **GREEDY)]
    # every model reads the prompt once; answers that fuse the response write into what was read
    caches = pair.read(batch)
    for fusers in (closed, pair.fusers):
        fused = pair.fuse(batch, caches=copy.deepcopy(caches), fusers=fusers)
        answers.append(pair.decode(batch, fused.cache, response_fuser=fused.response_fuser, **GREEDY))
    return [(answer.sequences, torch.cat(answer.logits).float().cpu()) for answer in answers]


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
