"""The command line: every verb parses, calls one function of the library, and prints."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvfuse.model import CacheToCache

app = typer.Typer(
    name="kvfuse", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
demo_app = typer.Typer(name="demo", invoke_without_command=True)
list_app = typer.Typer(name="list", no_args_is_help=True, help="Tell what there is.")
data_app = typer.Typer(name="data", no_args_is_help=True, help="Make data to train on.")
app.add_typer(demo_app)
app.add_typer(data_app)
app.add_typer(list_app)


@app.callback()
def kvfuse() -> None:
    """Language models that talk through their KV-caches instead of text."""


@app.command()
def chat(
    fuser: Annotated[list[str], typer.Option("--fuser", "-f", help="Folder or Hub id of a fuser; once per sharer.")],
    receiver: Annotated[
        str | None,
        typer.Option(
            "--receiver", "-r", help="Folder or Hub id of the model that answers; by default the fuser names it."
        ),
    ] = None,
    sharer: Annotated[
        list[str] | None,
        typer.Option("--sharer", "-s", help="Folder or Hub id of a model that only reads; in the order of the fusers."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation until an empty line.")
    ] = None,
    subfolder: Annotated[str, typer.Option(help="Folder of the fuser inside of its repository.")] = "",
    fusion: Annotated[
        str, typer.Option(help="How several sharers come together: parallel or sequential.")
    ] = "parallel",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
) -> None:
    """Ask two models that answer together.

    kvfuse chat -r Qwen/Qwen3-0.6B -s Qwen/Qwen2.5-0.5B-Instruct -f my-fuser "Why is the sky blue?"
    """
    from kvfuse.model import CacheToCache
    from kvfuse.stages.prefix_store import PrefixStore

    model = CacheToCache.from_pretrained(receiver, sharer or None, fuser, subfolder, fusion, device_map="auto")
    if prompt is not None:
        _answer(model, [{"role": "user", "content": prompt}], max_new_tokens)
        return
    model.store = PrefixStore()  # each turn reads only what is new
    messages: list[dict[str, str]] = []
    while question := typer.prompt("you", default="", show_default=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _answer(model, messages, max_new_tokens)})


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; recipes/ has examples.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe, e.g. train.steps=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be trained, and estimate time and memory.")
    ] = False,
) -> None:
    """Train a fuser for a pair of frozen models; started again, a killed run goes on where it was.

    kvfuse train recipes/stories.yaml train.steps=100 output=runs/short
    """
    from kvfuse.training.plan import plan
    from kvfuse.training.recipe import load_recipe
    from kvfuse.training.run import prepare_data
    from kvfuse.training.run import train as run

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(plan(loaded, prepare_data(loaded, typer.echo)))
    else:
        run(loaded, typer.echo)


@app.command("eval")
def evaluate(
    recipe: Annotated[Path, typer.Argument(help="YAML file with a section evaluation; recipes/ has examples.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of the recipe, e.g. evaluation.limit=100."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for answers, figures and report.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files, in place of the Hub.")] = None,
    template: Annotated[Path | None, typer.Option(help="Jinja file in place of the tasks' prompts.")] = None,
    zeroed: Annotated[bool, typer.Option("--zeroed", help="Control: the sharer's cache is zero.")] = False,
    mismatched: Annotated[
        bool, typer.Option("--mismatched", help="Control: the sharer reads another question.")
    ] = False,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Control: the sharer's positions are interchanged.")
    ] = False,
    random_fuser: Annotated[
        bool, typer.Option("--random-fuser", help="Control: a fuser that has learnt nothing.")
    ] = False,
    projected_only: Annotated[
        bool, typer.Option("--projected-only", help="Control: the receiver's own cache is taken away.")
    ] = False,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Control: the receiver without its preference for a letter.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Run everything on tiny random models and a few made-up questions.")
    ] = False,
) -> None:
    """Ask methods the same questions and report who is right, how surely, how fast; started again, a killed run goes on.

    kvfuse eval recipes/embedded.yaml --out runs/embedded-eval --calibrated
    """
    from kvfuse.evaluation.recipe import CONTROLS, load_evaluation
    from kvfuse.evaluation.run import evaluate as run

    words = [
        *(overrides or []),
        *(f"evaluation.{key}={value}" for key, value in (("data", data), ("template", template)) if value),
    ]
    wanted = (zeroed, mismatched, shuffled, random_fuser, projected_only, calibrated)
    loaded = load_evaluation(recipe, words).with_controls(
        [name for name, chosen in zip(CONTROLS, wanted, strict=True) if chosen]
    )
    if smoke:
        from kvfuse.evaluation.smoke import tiny

        loaded = tiny(loaded, out)
    run(loaded, out, typer.echo)


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of evaluations; one is written anew, several are set side by side.")
    ],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="Page for several; its Markdown is written beside it.")
    ] = Path("report.html"),
) -> None:
    """Write the report of an evaluation again, or set several side by side.

    kvfuse report runs/embedded-eval
    """
    from kvfuse.evaluation.report.comparison import write_comparison
    from kvfuse.evaluation.report.write import write_report

    if len(folders) == 1:
        write_report(folders[0])
        typer.echo(f"wrote {folders[0] / 'report.html'}")
    else:
        write_comparison(folders, out)
        typer.echo(f"wrote {out}")


@data_app.command()
def generate(
    source: Annotated[str, typer.Argument(help="File, folder or Hub data set; see the key data of recipes.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or Hub id of the model that responds.")],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="JSON lines; prompts that it holds already are not asked again.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of a recipe's data, e.g. split=test limit=100."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token every time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of so much probability.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts asked at once.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 42,
) -> None:
    """Let a model respond to the prompts of any data, to train on its own words; started again, a killed run goes on.

    kvfuse data generate teknium/OpenHermes-2.5 limit=1000 --model Qwen/Qwen3-0.6B --out own-words.jsonl
    """
    from kvfuse.language_model import LanguageModel
    from kvfuse.training.data.generate import Sampling
    from kvfuse.training.data.generate import generate as run
    from kvfuse.training.recipe import load_data

    data = load_data(source, overrides or [])
    run(
        data,
        LanguageModel.from_pretrained(model, device_map="auto"),
        out,
        Sampling(temperature, top_p, max_new_tokens, batch_size, seed),
        typer.echo,
    )


@app.command()
def align(
    receiver: Annotated[str, typer.Option("--receiver", "-r", help="Folder or Hub id of the model that answers.")],
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="Folder or Hub id of the model that only reads.")],
    text: Annotated[str | None, typer.Argument(help="What the user says.")] = None,
    chat: Annotated[Path | None, typer.Option(help="In place of a text: a JSON file with a list of messages.")] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="identity, span, reencode-first or reencode-longest; by default identity for one tokenizer, else span."
        ),
    ] = None,
    fuse: Annotated[str, typer.Option(help="all positions but the last, or only those of messages.")] = "all",
    html: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write a picture to this file, in place of the lines.")
    ] = None,
) -> None:
    """Show a prompt in both tokenizations, and which sharer token each receiver token reads. Only the tokenizers are loaded.

    kvfuse align "What is the capital of Norway?" -r Qwen/Qwen3-0.6B -s meta-llama/Llama-3.2-1B-Instruct --html alignment.html
    """
    from kvfuse.errors import PromptError
    from kvfuse.language_model import load_tokenizer, tokenizer_hash
    from kvfuse.prompts.alignment import default_token_alignment
    from kvfuse.prompts.view import lines, load_chat, page, summary, view
    from kvfuse.support.files import write_file

    if (text is None) == (chat is None):
        raise PromptError(
            f"expected a text or --chat, got {'neither' if text is None else 'both'}; give one of the two"
        )
    prompt = load_chat(chat) if chat else text or ""
    tokenizers = load_tokenizer(receiver), load_tokenizer(sharer)
    identical = tokenizer_hash(tokenizers[0]) == tokenizer_hash(tokenizers[1])
    seen = view(prompt, *tokenizers, default_token_alignment(identical) if how is None else how, fuse)
    if html:
        write_file(html, page(seen))
    typer.echo(summary(seen) if html else "\n".join(lines(seen)))


@app.command()
def analyze(
    name: Annotated[str, typer.Argument(help="What to ask; 'kvfuse list analyses' tells what there is.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Options of the analysis, e.g. share=0.25.")
    ] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the figures (JSON) and the picture (PNG and SVG).")
    ] = Path("analysis"),
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Only whether it runs: tiny random models, fewer of everything.")
    ] = False,
    fuser: Annotated[
        list[str] | None,
        typer.Option("--fuser", "-f", help="Folder or Hub id of a fuser; by default the embedded pair."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="With a fuser: questions and answers, as training reads them.")
    ] = None,
    receiver: Annotated[
        str | None, typer.Option("--receiver", "-r", help="By default the one that the fuser names.")
    ] = None,
    sharer: Annotated[
        list[str] | None, typer.Option("--sharer", "-s", help="By default those that the fusers name.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask so many of the questions.")] = None,
) -> None:
    """Answer one of the paper's questions about a pair, by default about the embedded one, with figures and a picture.

    kvfuse analyze gates --out analysis
    """
    if not fuser:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded
    from kvfuse.analysis.registry import analyze as run
    from kvfuse.analysis.registry import module_of, parse_options
    from kvfuse.analysis.study import choose

    module_of(name)  # an unknown one is refused before anything is loaded
    study = choose(fuser or (), data, receiver, sharer or (), limit, smoke)
    finding = run(name, study, **parse_options(options or []))
    typer.echo(finding.reading)
    typer.echo(f"wrote {', '.join(map(str, finding.save(out, name)))}")


@app.command()
def doctor(
    fuser: Annotated[
        list[str] | None,
        typer.Option("--fuser", "-f", help="Folder or Hub id of a fuser; by default the embedded pair."),
    ] = None,
    receiver: Annotated[
        str | None, typer.Option("--receiver", "-r", help="By default the one that the fuser names.")
    ] = None,
    sharer: Annotated[
        list[str] | None, typer.Option("--sharer", "-s", help="By default those that the fusers name.")
    ] = None,
) -> None:
    """Examine a pair: shapes, tokenizers, alignment, gates, memory and time; closed gates must leave the receiver as it is.

    kvfuse doctor -r Qwen/Qwen3-0.6B -s Qwen/Qwen2.5-0.5B-Instruct -f my-fuser
    """
    from rich.console import Console

    from kvfuse.analysis.doctor import examine, sample_of, table, verdict

    if not fuser:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded
    checks = examine(sample_of(fuser or (), receiver, sharer or ()))
    Console().print(table(checks))
    typer.echo(verdict(checks))
    if not all(check.well for check in checks):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of a fuser.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    subfolder: Annotated[str, typer.Option(help="Folder inside of the source.")] = "",
) -> None:
    """Turn a fuser of the authors' format into ours (safetensors), or one of ours into theirs.

    kvfuse convert nics-efc/C2C_Fuser my-fuser --subfolder qwen3_0.6b+qwen2.5_0.5b_Fuser
    """
    from kvfuse.checkpoint import convert as run

    typer.echo(f"wrote {run(source, folder, subfolder)}")


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="FUSER", help="Folder or Hub id of a fuser.")],
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    weights: Annotated[str, typer.Option(help="int8 or int4.")] = "int8",
    subfolder: Annotated[str, typer.Option(help="Folder inside of the source.")] = "",
) -> None:
    """Write a smaller copy of a fuser, whose large matrices are integers; it answers like the other, but cannot be trained.

    kvfuse quantize my-fuser my-small-fuser --weights int4
    """
    from kvfuse.checkpoint import quantize as run

    typer.echo(run(source, folder, weights, subfolder))


@list_app.command()
def pairs() -> None:
    """Tell what is known of the authors' published pairs, with sources."""
    from kvfuse.published.pairs import PUBLISHED_PAIRS, REPOSITORY

    typer.echo(f"Fusers in {REPOSITORY}; load one with its name as subfolder.")
    for pair in PUBLISHED_PAIRS:
        typer.echo(pair)


@list_app.command()
def methods() -> None:
    """Name the ways to answer that evaluations compare."""
    from kvfuse.methods import METHODS

    typer.echo("\n".join(METHODS))


@list_app.command()
def tasks() -> None:
    """Name the tasks that evaluations ask."""
    from kvfuse.evaluation.tasks import task_names

    typer.echo("\n".join(task_names()))


@list_app.command()
def analyses() -> None:
    """Tell which analyses there are, and the question that each answers."""
    from kvfuse.analysis.registry import ANALYSES, question

    for name in ANALYSES:
        typer.echo(f"{name:<16}{question(name)}")


@demo_app.callback()
def demo(
    context: typer.Context,
    ask: Annotated[str | None, typer.Option(help="Ask one question, e.g. 'What currency is used in Norway?'")] = None,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Fusers to score, by training seed; by default all that are shipped.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Score so many of the held-out questions.")] = None,
    pair: Annotated[
        Path | None, typer.Option(help="A folder that 'kvfuse demo build' made, in place of the shipped pair.")
    ] = None,
) -> None:
    """Let the embedded pair answer its held-out questions with every method, side by side."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # nothing is downloaded
    if context.invoked_subcommand is None:
        from kvfuse.demo.show import answer_one, run

        if ask is not None:
            answer_one(ask, pair)
        else:
            run(pair, json_file=json, seeds=seed, limit=limit)


@demo_app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="New folder for facts, tokenizers, models, fusers and figures.")],
) -> None:
    """Make the embedded pair again from nothing, in under 20 minutes on two cores. Needs the extra 'demo-build'."""
    from kvfuse.demo.build import build as run

    run(folder)


def _answer(model: "CacheToCache", messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Print an answer as it comes, and give it back."""
    pieces = []
    for piece in model.stream(messages, max_new_tokens=max_new_tokens):
        typer.echo(piece, nl=False)
        pieces.append(piece)
    typer.echo()
    return "".join(pieces)


def main() -> None:
    """Entry point: errors that kvfuse raises on purpose become one line and exit status 1."""
    from kvfuse.errors import KVFuseError

    try:
        app()
    except KVFuseError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
