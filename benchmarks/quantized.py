"""What fusers with int8 and int4 weights lose, save and cost, beside the full ones they are made of.

python -m benchmarks.quantized [--fuser FOLDER]... [--layers 28] [--repeats 5] [--json FILE]

Answers: the embedded pair's held-out questions, averaged over its fusers, intervals by bootstrap over places; a change is paired
question by question. Residual, size and time: the paper's fuser in the widths of Qwen3-0.6B <- Qwen2.5-0.5B, random weights, standard
normal caches, float32 on the CPU, one thread; the three take turns, times are medians.
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
from benchmarks.rows import Row, report, row, spread_row
from benchmarks.timing import in_turns, ratio, timed
from kvfuse.cache.kv import KV, KVSpec
from kvfuse.checkpoint import load_fuser
from kvfuse.demo.pair_folder import PairFolder
from kvfuse.demo.questions import Question
from kvfuse.demo.score import ask_all, held_out, is_right
from kvfuse.evaluation.scoring.statistics import Interval, bootstrap_mean
from kvfuse.fusers import Fuser, make_fuser, quantize
from kvfuse.fusers.execution.quantized import FORMATS
from kvfuse.fusers.folder import size_of
from kvfuse.methods import make_method
from kvfuse.model import CacheToCache

LAYERS_OF_RESIDUAL = 2
TOKENS = (1, 16, 256)
BARS = {("int8", 256): 0.60}


def variants(fuser: Fuser) -> dict[str, Fuser]:
    """A fuser as it is and in every format."""
    return {"full": fuser, **{weights: quantize(fuser, weights) for weights in FORMATS}}


def answer_rows(folders: Sequence[Path]) -> Iterator[Row]:
    """Who is right on the embedded pair, and what is answered otherwise than by the full fusers."""
    pair = PairFolder()
    questions = held_out(pair)
    places = [question.place for question in questions]
    fusers = [variants(load_fuser(folder)) for folder in folders]
    setting = f"{fusers[0]['full'].config.model_type.removeprefix('kvfuse-')}, {len(fusers)} fusers, {len(questions)} questions"
    sizes = {name: size_of(fuser) for name, fuser in fusers[0].items()}
    asked = {name: [_ask(pair, one[name], questions) for one in fusers] for name in fusers[0]}
    right = {name: np.array([is_right(answers) for answers in runs]) for name, runs in asked.items()}
    texts = {name: np.array([[row.answer for row in answers] for answers in runs]) for name, runs in asked.items()}
    for name in asked:
        yield row(f"{name}: size", setting, sizes[name] / 1e6, None, "MB")
        yield _with_interval(f"{name}: right", setting, bootstrap_mean(right[name].mean(0), places))
        if name != "full":
            change = bootstrap_mean((right[name].astype(float) - right["full"]).mean(0), places)
            yield _with_interval(f"{name} - full", setting, change, "points")
            for turn, (before, after) in {"lost": (True, False), "won": (False, True)}.items():
                share = ((right["full"] == before) & (right[name] == after)).mean()
                yield row(f"{name}: right answers {turn}", setting, 100 * share, None, "%")
            yield row(
                f"{name}: answers that read otherwise", setting, 100 * (texts[name] != texts["full"]).mean(), None, "%"
            )


def residual_rows() -> Iterator[Row]:
    """How far the residual of a few layers is from the full fuser's, and how large all layers are."""
    small, inputs = true_fuser(LAYERS_OF_RESIDUAL), caches(LAYERS_OF_RESIDUAL, 256)
    residuals = {name: _flat(fuser(receiver=inputs[0], sharer=inputs[1])) for name, fuser in variants(small).items()}
    for name in FORMATS:
        lost = float((residuals[name] - residuals["full"]).norm() / residuals["full"].norm())
        yield row(f"{name}: residual off by", f"true widths, {LAYERS_OF_RESIDUAL} layers", 100 * lost, None, "%")
    for name in ("full", *FORMATS):
        with torch.device("meta"):
            whole = type(small)(type(small.config)(**_pair(28), weights=name)).to(torch.bfloat16)
        yield row(f"{name}: size", "true shapes, bfloat16", size_of(whole) / 1e6, None, "MB")


def time_rows(layers: int, repeats: int) -> Iterator[Row]:
    """Seconds of a call, and their ratios to the full fuser's."""
    fusers = variants(true_fuser(layers))
    for tokens in TOKENS:
        inputs, setting = caches(layers, tokens), f"true widths, {layers} layers, {tokens} tokens"
        calls = {name: partial(timed, fuser.__call__, *inputs) for name, fuser in fusers.items()}
        in_turns(calls, 1)
        taken = in_turns(calls, repeats)
        yield spread_row("full", setting, [1e3 * seconds for seconds in taken["full"]], None, "ms")
        for name in FORMATS:
            yield spread_row(
                f"{name} / full", setting, ratio(taken[name], taken["full"]), BARS.get((name, tokens)), "x"
            )


def true_fuser(layers: int) -> Fuser:
    """The paper's fuser in true widths with open gates, frozen."""
    torch.manual_seed(0)
    return make_fuser("c2c", gate_init=1.0, **_pair(layers)).eval().requires_grad_(False)


def caches(layers: int, tokens: int) -> tuple[KV, KV]:
    """Standard normal caches of both models."""
    mine, theirs = (
        KV(*(torch.randn(spec.num_layers, 1, spec.num_kv_heads, tokens, spec.key_dim) for _ in range(2)))
        for spec in _specs(layers)
    )
    return mine, theirs


def _specs(layers: int) -> tuple[KVSpec, KVSpec]:
    head = QWEN2_5_0_5B["hidden_size"] // QWEN2_5_0_5B["num_attention_heads"]
    mine = KVSpec(layers, QWEN3_0_6B["num_key_value_heads"], QWEN3_0_6B["head_dim"], QWEN3_0_6B["head_dim"])
    return mine, KVSpec(min(layers, QWEN2_5_0_5B["num_hidden_layers"]), QWEN2_5_0_5B["num_key_value_heads"], head, head)


def _pair(layers: int) -> dict[str, Any]:
    return {whose: {"kv": vars(spec)} for whose, spec in zip(("receiver", "sharer"), _specs(layers), strict=True)}


def _flat(residual: KV) -> Tensor:
    return torch.cat([residual.key.flatten(), residual.value.flatten()])


def _ask(pair: PairFolder, fuser: Fuser, questions: Sequence[Question]) -> list[Any]:
    fused = CacheToCache(pair.receiver, [pair.sharer], [fuser.float()])
    return ask_all(make_method("cache-to-cache", fused), questions)


def _with_interval(figure: str, setting: str, measured: tuple[float, Interval], unit: str = "%") -> Row:
    mean, interval = measured
    return {**row(figure, setting, 100 * mean, None, unit), "low": 100 * interval[0], "high": 100 * interval[1]}


@torch.no_grad()
def main(
    fuser: Annotated[
        list[Path] | None, typer.Option(help="Fusers of the embedded pair; by default the shipped ones.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Whose time is measured.")] = 28,
    repeats: Annotated[int, typer.Option(help="Of each time; 0 leaves them out.")] = 5,
    file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    shipped = [PairFolder().path / f"fuser-{seed}" for seed in PairFolder().seeds]
    report(chain(answer_rows(fuser or shipped), residual_rows(), time_rows(layers, repeats) if repeats else ()), file)


if __name__ == "__main__":
    typer.run(main)
