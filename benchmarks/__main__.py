"""Time and memory of Cache-to-Cache next to its necessary parts.

python -m benchmarks [--quick] [--device cpu|cuda] [--json FILE] [--markdown FILE] [--plot FILE]

One process, one thread on a CPU. Candidates take turns; times are medians, with the least and the most of all rounds,
and ratios are taken round by round. Weights are random except for the embedded pair's; they cost what trained ones do.
"""

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.drawing import draw
from benchmarks.rows import JsonFile, markdown, report
from benchmarks.suite import FULL, GPU, QUICK, build_pair, measure
from kvfuse.support.plots import save


def main(
    quick: Annotated[bool, typer.Option(help="Fewer sizes and rounds: minutes on two cores.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the GPU's figures, in bfloat16.")] = "cpu",
    json_file: JsonFile = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write them as a table too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them, PNG or SVG by suffix.")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    # what a GPU is measured for is another plan, not a faster one
    plan = GPU if device != "cpu" else QUICK if quick else FULL
    rows = report(measure(plan, partial(build_pair, device=device)), json_file)
    typer.echo(f"{time.perf_counter() - start:.0f} s", err=True)
    if markdown_file is not None:
        markdown_file.write_text(markdown(rows), encoding="utf-8")
    if plot is not None:
        save(draw(rows), plot)


if __name__ == "__main__":
    typer.run(main)
