"""What int8 and int4 weights of a fuser lose, save and cost, next to the full fuser.

python -m benchmarks.quantized [--fuser FOLDER]... [--layers 28] [--repeats 5] [--json FILE]

Answers: the embedded pair's held-out questions, averaged over its fusers, intervals by bootstrap over places; changes
are paired question by question. Residual, size and time: the paper's fuser in the widths of Qwen3-0.6B <- Qwen2.5-0.5B,
random weights, standard normal caches, float32 on the CPU, one thread; the three take turns, times are medians.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.pairs import QWEN2_5_0_5B, QWEN3_0_6B
from benchmarks.rows import JsonFile, Row, report, row, spread_row
from benchmarks.timing import in_turns, milliseconds, ratio, timed
from kvfuse.cache.kv import KV, KVSpec
from kvfuse.checkpoint import load_fuser
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question
from kvfuse.demo.score import ask_all, held_out, is_right
from kvfuse.evaluation.predictions import Prediction
from kvfuse.evaluation.scoring.statistics import Interval, bootstrap_mean
from kvfuse.fusers import Fuser, make_fuser, quantize
from kvfuse.fusers.execution.quantized import FORMATS
from kvfuse.fusers.folder import size_of
from kvfuse.methods import make_method
from kvfuse.model import CacheToCache

RESIDUAL_LAYERS, ALL_LAYERS = 2, 28
TOKENS = (1, 16, 256)
BARS = {("int8", 256): 0.60}


def variants(fuser: Fuser) -> dict[str, Fuser]:
    """Returns a fuser in every format, the full one first."""
    return {"full": fuser, **{weights: quantize(fuser, weights) for weights in FORMATS}}


def answer_rows(folders: Sequence[Path]) -> Iterator[Row]:
    """Accuracy on the embedded pair, and the answers that differ from the full fusers'."""
    # 1) Ask every fuser in every format: (fusers, questions) each.
    pair = PairFolder()
    questions = held_out(pair)
    places = [question.place for question in questions]
    fusers = [variants(load_fuser(folder)) for folder in folders]
    right, texts = {}, {}
    for name in fusers[0]:
        runs = [_ask(pair, formats[name], questions) for formats in fusers]
        right[name] = np.array([is_right(answers) for answers in runs])
        texts[name] = np.array([[answer.answer for answer in answers] for answers in runs])
    # 2) Compare each format with the full fusers.
    kind = fusers[0]["full"].config.model_type.removeprefix("kvfuse-")
    setting = f"{kind}, {len(fusers)} fusers, {len(questions)} questions"
    for name, fuser in fusers[0].items():
        yield row(f"{name}: size", setting, size_of(fuser) / 1e6, None, "MB")
        yield _with_interval(f"{name}: right", setting, bootstrap_mean(right[name].mean(0), places))
        if name == "full":
            continue
        change = bootstrap_mean((right[name].astype(float) - right["full"]).mean(0), places)
        yield _with_interval(f"{name} - full", setting, change, "points")
        lost, won = (right["full"] & ~right[name]).mean(), (~right["full"] & right[name]).mean()
        yield row(f"{name}: right answers lost", setting, 100 * lost, None, "%")
        yield row(f"{name}: right answers won", setting, 100 * won, None, "%")
        changed = (texts[name] != texts["full"]).mean()
        yield row(f"{name}: answers that read otherwise", setting, 100 * changed, None, "%")


def residual_rows() -> Iterator[Row]:
    """The relative error of the residual in a few layers, and the size of all layers."""
    # 1) Errors, at true widths but few layers: the error does not depend on their number.
    small, inputs = true_fuser(RESIDUAL_LAYERS), caches(RESIDUAL_LAYERS, 256)
    residuals = {name: _flat(fuser(**inputs)) for name, fuser in variants(small).items()}
    for name in FORMATS:
        error = float((residuals[name] - residuals["full"]).norm() / residuals["full"].norm())
        yield row(f"{name}: residual off by", f"true widths, {RESIDUAL_LAYERS} layers", 100 * error, None, "%")
    # 2) Sizes of all layers, without allocating them.
    for name in ("full", *FORMATS):
        with torch.device("meta"):
            whole = type(small)(type(small.config)(**_shapes(ALL_LAYERS), weights=name)).to(torch.bfloat16)
        yield row(f"{name}: size", "true shapes, bfloat16", size_of(whole) / 1e6, None, "MB")


def time_rows(layers: int, repeats: int) -> Iterator[Row]:
    """Time of a call, and its ratio to the full fuser's."""
    fusers = variants(true_fuser(layers))
    for tokens in TOKENS:
        inputs, setting = caches(layers, tokens), f"true widths, {layers} layers, {tokens} tokens"
        calls = {name: partial(timed, fuser.__call__, **inputs) for name, fuser in fusers.items()}
        in_turns(calls, 1)  # warm-up
        taken = in_turns(calls, repeats)
        yield spread_row("full", setting, milliseconds(taken["full"]), None, "ms")
        for name in FORMATS:
            over_full = ratio(taken[name], taken["full"])
            yield spread_row(f"{name} / full", setting, over_full, BARS.get((name, tokens)), "x")


def true_fuser(layers: int) -> Fuser:
    """Returns the paper's fuser in true widths with open gates, frozen."""
    torch.manual_seed(0)
    return make_fuser("c2c", gate_init=1.0, **_shapes(layers)).eval().requires_grad_(False)


def caches(layers: int, tokens: int) -> dict[str, KV]:
    """Returns standard normal caches ``(L, 1, H, tokens, D)`` of receiver and sharer."""
    return {
        role: KV(*(torch.randn(spec.num_layers, 1, spec.num_kv_heads, tokens, spec.key_dim) for _ in range(2)))
        for role, spec in _specs(layers).items()
    }


def _specs(layers: int) -> dict[str, KVSpec]:
    # layers beyond the sharer's read its last ones
    depths = {"receiver": layers, "sharer": min(layers, QWEN2_5_0_5B["num_hidden_layers"])}
    sizes = {"receiver": QWEN3_0_6B, "sharer": QWEN2_5_0_5B}
    return {
        role: KVSpec(depths[role], size["num_key_value_heads"], size["head_dim"], size["head_dim"])
        for role, size in sizes.items()
    }


def _shapes(layers: int) -> dict[str, Any]:
    return {role: {"kv": vars(spec)} for role, spec in _specs(layers).items()}


def _flat(residual: KV) -> Tensor:
    return torch.cat([residual.key.flatten(), residual.value.flatten()])


def _ask(pair: PairFolder, fuser: Fuser, questions: Sequence[Question]) -> list[Prediction]:
    fused = CacheToCache(pair.receiver, [pair.sharer], [fuser.float()])
    return ask_all(make_method("cache-to-cache", fused), questions)


def _with_interval(figure: str, setting: str, estimate: tuple[float, Interval], unit: str = "%") -> Row:
    mean, (low, high) = estimate
    return {**row(figure, setting, 100 * mean, None, unit), "low": 100 * low, "high": 100 * high}


@torch.no_grad()
def main(
    fuser: Annotated[
        list[Path] | None, typer.Option(help="Fusers of the embedded pair; by default the shipped ones.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of the fuser that is timed.")] = ALL_LAYERS,
    repeats: Annotated[int, typer.Option(help="Rounds of each timing; 0: none.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    folders = fuser or [PairFolder().path / f"fuser-{seed}" for seed in PairFolder().seeds]
    timings = time_rows(layers, repeats) if repeats else ()
    report(chain(answer_rows(folders), residual_rows(), timings), json_file)


if __name__ == "__main__":
    typer.run(main)
