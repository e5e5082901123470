"""The command line: each command parses its options, calls one function of the library and prints the result."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option, Typer

from kvfuse import __version__

if TYPE_CHECKING:
    from kvfuse.conversation import Conversation

app = Typer(
    name="kvfuse", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
data_app = Typer(name="data", no_args_is_help=True, help="Make training data.")
list_app = Typer(name="list", no_args_is_help=True, help="List methods, tasks, analyses and published pairs.")
demo_app = Typer(name="demo", invoke_without_command=True)
for sub_app in (demo_app, data_app, list_app):
    app.add_typer(sub_app)

# The options that several commands share
KEY_VALUES = "[KEY=VALUE]..."
EMBEDDED = "Default: the embedded pair."
Recipe = Annotated[Path, Argument(help="YAML file, e.g. recipes/embedded.yaml.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar=KEY_VALUES, help="Values in place of the recipe's, e.g. train.steps=100.")
]
Receiver = Annotated[
    str | None, Option("--receiver", "-r", help="Model that answers, folder or Hub id. Default: named by the fuser.")
]
Sharers = Annotated[
    list[str] | None,
    Option("--sharer", "-s", help="Model that only reads, folder or Hub id; one per fuser. Default: named by it."),
]
Fusers = Annotated[
    list[str] | None, Option("--fuser", "-f", help=f"Fuser, folder or Hub id; one per sharer. {EMBEDDED}")
]
FuserSource = Annotated[str, Argument(metavar="FUSER", help="Folder or Hub id of a fuser.")]
NewFolder = Annotated[Path, Argument(help="Folder to write.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace the fuser that the folder holds.")]
StartAgain = Annotated[bool, Option("--overwrite", help="Start again where the folder holds another run.")]
Subfolder = Annotated[str, Option(help="Folder of the fuser inside its repository.")]
# Of every command that loads models and reads no recipe, which names its own; _loading() takes both
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    Option(help="Of the models' weights. auto: as stored, or float32 on a CPU that is faster with it."),
]
Device = Annotated[str, Option(help="For the models, e.g. cpu or cuda:1. auto: spread over what there is.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvfuse {__version__}")
        raise typer.Exit


@app.callback()
def kvfuse(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Language models that communicate through their KV-caches instead of text."""
    if not sys.stderr.isatty():
        _hide_progress_bars()


# Answer


@app.command()
def chat(
    fuser: Annotated[list[str], Option("--fuser", "-f", help="Fuser, folder or Hub id; one per sharer.")],
    receiver: Receiver = None,
    sharer: Sharers = None,
    prompt: Annotated[str | None, Argument(help="Question. Default: a conversation, until an empty line.")] = None,
    subfolder: Subfolder = "",
    fusion: Annotated[str, Option(help="With several sharers: parallel or sequential.")] = "parallel",
    system: Annotated[str | None, Option(help="Instructions before the first question.")] = None,
    max_new_tokens: Annotated[int, Option(help="Maximum length of an answer.")] = 256,
    temperature: Annotated[float | None, Option(help="0: greedy. Default: as the receiver's authors sample.")] = None,
    seed: Annotated[int | None, Option(help="Of the sampling.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Ask two models that answer together.

    kvfuse chat -r Qwen/Qwen3-0.6B -s Qwen/Qwen2.5-0.5B-Instruct -f my-fuser "Why is the sky blue?"
    """
    from kvfuse.conversation import Conversation, sampling
    from kvfuse.model import CacheToCache

    options = {"max_new_tokens": max_new_tokens, **sampling(temperature, seed)}
    pair = CacheToCache.from_pretrained(receiver, sharer or None, fuser, subfolder, fusion, **_loading(dtype, device))
    conversation = Conversation(pair, system, **options)
    if prompt is not None:
        _print_pieces(conversation.ask(prompt))
    else:
        _converse(conversation)


# Train and evaluate


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be trained, with time and memory.")] = False,
    overwrite: StartAgain = False,
) -> None:
    """Train a fuser for two frozen models. A killed run, started again, resumes.

    kvfuse train recipes/stories.yaml train.steps=100 output=runs/short
    """
    from kvfuse.training.recipe import load_recipe
    from kvfuse.training.run import dry_run as estimate
    from kvfuse.training.run import train as run

    loaded = load_recipe(recipe, overrides or [])
    if dry_run:
        typer.echo(estimate(loaded, typer.echo, overwrite))
    else:
        run(loaded, typer.echo, overwrite=overwrite)


@app.command("eval")
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    *,
    out: Annotated[Path, Option(file_okay=False, help="Folder for answers, figures and report.")],
    data: Annotated[Path | None, Option(exists=True, help="Folder with the tasks' files. Default: the Hub.")] = None,
    template: Annotated[Path | None, Option(help="Jinja file that replaces the tasks' prompts.")] = None,
    zeroed: Annotated[bool, Option("--zeroed", help="Control: the sharer's cache is zero.")] = False,
    mismatched: Annotated[bool, Option("--mismatched", help="Control: the sharer reads another question.")] = False,
    shuffled: Annotated[bool, Option("--shuffled", help="Control: the sharer's positions are shuffled.")] = False,
    random_fuser: Annotated[bool, Option("--random-fuser", help="Control: a fuser with random weights.")] = False,
    projected_only: Annotated[
        bool, Option("--projected-only", help="Control: the receiver's cache is removed.")
    ] = False,
    audit: Annotated[
        bool, Option("--audit", help="All controls that say which part of a gain is communication.")
    ] = False,
    calibrated: Annotated[bool, Option("--calibrated", help="Control: the receiver without letter bias.")] = False,
    smoke: Annotated[
        bool, Option("--smoke", help="Run the recipe on tiny random models and made-up questions.")
    ] = False,
    overwrite: StartAgain = False,
) -> None:
    """Compare methods on the same questions: accuracy with intervals, latency, a verdict. A killed run resumes.

    kvfuse eval recipes/embedded.yaml --out runs/embedded-eval --calibrated
    """
    from kvfuse.evaluation.recipe import AUDIT, CONTROLS, load_evaluation
    from kvfuse.evaluation.run import evaluate as run

    paths = {"data": data, "template": template}
    words = [*(overrides or []), *(f"evaluation.{key}={path}" for key, path in paths.items() if path)]
    flags = (zeroed, mismatched, shuffled, random_fuser, projected_only, calibrated)
    controls = [name for name, wanted in zip(CONTROLS, flags, strict=True) if wanted]
    loaded = load_evaluation(recipe, words).with_controls([*(AUDIT if audit else ()), *controls])
    run(loaded, out, typer.echo, overwrite=overwrite, smoke=smoke)


@app.command()
def report(
    folders: Annotated[list[Path], Argument(help="Folders of evaluations; several are compared.")],
    out: Annotated[Path, Option(dir_okay=False, help="HTML page of a comparison.")] = Path("report.html"),
) -> None:
    """Write the report of an evaluation again, or compare several evaluations.

    kvfuse report runs/embedded-eval
    """
    from kvfuse.evaluation.report.comparison import write_comparison
    from kvfuse.evaluation.report.write import write_report

    if len(folders) == 1:
        write_report(folders[0])
        out = folders[0] / "report.html"
    else:
        write_comparison(folders, out)
    typer.echo(f"wrote {out}")


@data_app.command()
def generate(
    source: Annotated[str, Argument(help="File, folder or Hub data set with prompts.")],
    model: Annotated[str, Option("--model", "-m", help="Folder or Hub id of the model that responds.")],
    out: Annotated[Path, Option(dir_okay=False, help="JSON lines file to extend; its prompts are skipped.")],
    overrides: Annotated[list[str] | None, Argument(metavar=KEY_VALUES, help="Keys of data, e.g. limit=100.")] = None,
    temperature: Annotated[float, Option(min=0.0, help="Sampling temperature; 0: greedy.")] = 0.0,
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum length of a response.")] = 512,
    batch_size: Annotated[int, Option(min=1, help="Prompts per batch.")] = 8,
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 42,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Generate a model's own responses to any prompts, as training data. A killed run resumes.

    kvfuse data generate teknium/OpenHermes-2.5 limit=1000 --model Qwen/Qwen3-0.6B --out own-words.jsonl
    """
    from kvfuse.language_model import LanguageModel
    from kvfuse.training.data.generate import Sampling
    from kvfuse.training.data.generate import generate as run
    from kvfuse.training.recipe import load_data

    data = load_data(source, overrides or [])
    sampling = Sampling(temperature, top_p, max_new_tokens, batch_size, seed)
    run(data, LanguageModel.from_pretrained(model, **_loading(dtype, device)), out, sampling, typer.echo)


# Look inside a pair


@app.command()
def align(
    receiver: Annotated[str, Option("--receiver", "-r", help="Model that answers, folder or Hub id.")],
    sharer: Annotated[str, Option("--sharer", "-s", help="Model that only reads, folder or Hub id.")],
    text: Annotated[str | None, Argument(help="Message of a user.")] = None,
    chat: Annotated[Path | None, Option(help="JSON file with a list of messages, in place of a text.")] = None,
    how: Annotated[
        str | None, Option(help="identity (default for one tokenizer), span (else), reencode-first, reencode-longest.")
    ] = None,
    fuse: Annotated[str, Option(help="Positions to fuse, except the last: all, or those of messages.")] = "all",
    html: Annotated[Path | None, Option(dir_okay=False, help="Write the alignment to this file, in colours.")] = None,
) -> None:
    """Show a prompt in both tokenizations, and the sharer token that each receiver token reads.

    kvfuse align "What is the capital of Norway?" -r Qwen/Qwen3-0.6B -s meta-llama/Llama-3.2-1B-Instruct
    """
    from kvfuse.errors import PromptError
    from kvfuse.language_model import load_tokenizer, tokenizer_hash
    from kvfuse.prompts.alignment import default_token_alignment
    from kvfuse.prompts.view import lines, load_chat, page, summary, view
    from kvfuse.support.files import write_file

    if (text is None) == (chat is None):
        got = "neither" if text is None else "both"
        raise PromptError(f"expected a text or --chat, got {got}; give one of the two")
    prompt = load_chat(chat) if chat else text or ""
    tokenizers = load_tokenizer(receiver), load_tokenizer(sharer)
    same = tokenizer_hash(tokenizers[0]) == tokenizer_hash(tokenizers[1])
    seen = view(prompt, *tokenizers, default_token_alignment(same) if how is None else how, fuse)
    if html:
        write_file(html, page(seen))
    typer.echo(summary(seen) if html else "\n".join(lines(seen)))


@app.command()
def analyze(
    name: Annotated[str, Argument(help="Name of the analysis; see 'kvfuse list analyses'.")],
    options: Annotated[list[str] | None, Argument(metavar=KEY_VALUES, help="Its options, e.g. share=0.25.")] = None,
    out: Annotated[Path, Option(file_okay=False, help="Folder for figures (JSON) and pictures.")] = Path("analysis"),
    smoke: Annotated[bool, Option("--smoke", help="Test run on tiny random models.")] = False,
    fuser: Fusers = None,
    data: Annotated[str | None, Option("--data", "-d", help="With --fuser: its questions, as for training.")] = None,
    receiver: Receiver = None,
    sharer: Sharers = None,
    limit: Annotated[int | None, Option(min=1, help="Maximum number of questions.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer one of the paper's questions about a pair, with figures and a picture.

    kvfuse analyze gates --out analysis
    """
    if not fuser:
        _hide_progress_bars()
    from kvfuse.analysis.registry import analyze as run
    from kvfuse.analysis.registry import module_of, parse_options
    from kvfuse.analysis.study import choose

    module_of(name)  # refuses an unknown name before anything is loaded
    study = choose(fuser or (), data, receiver, sharer or (), limit, smoke, **_loading(dtype, device))
    out.mkdir(parents=True, exist_ok=True)  # where it cannot be written, say so before the work
    finding = run(name, study, **parse_options(options or []))
    typer.echo(finding.reading)
    typer.echo(f"wrote {', '.join(map(str, finding.save(out, name)))}")


@app.command()
def doctor(
    fuser: Fusers = None,
    receiver: Receiver = None,
    sharer: Sharers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Check a pair: shapes, tokenizers, alignment, gates, memory, time, and whether closed gates change nothing.

    kvfuse doctor -r Qwen/Qwen3-0.6B -s Qwen/Qwen2.5-0.5B-Instruct -f my-fuser
    """
    if not fuser:
        _hide_progress_bars()
    _say("loading the pair")
    from kvfuse.analysis.doctor import examine, line, sample_of, verdict

    study, checks = sample_of(fuser or (), receiver, sharer or (), **_loading(dtype, device)), []
    for check in examine(study, _say):
        typer.echo(line(check))
        checks.append(check)
    typer.echo(verdict(checks))
    if not all(check.well for check in checks):
        raise typer.Exit(1)


# Fuser folders


@app.command()
def convert(source: FuserSource, folder: NewFolder, subfolder: Subfolder = "", overwrite: Overwrite = False) -> None:
    """Convert a fuser from the authors' format to kvfuse's (safetensors), or back.

    kvfuse convert nics-efc/C2C_Fuser my-fuser --subfolder qwen3_0.6b+qwen2.5_0.5b_Fuser
    """
    from kvfuse.checkpoint import convert as run

    typer.echo(f"wrote {run(source, folder, subfolder, overwrite=overwrite)}")


@app.command()
def quantize(
    source: FuserSource,
    folder: NewFolder,
    weights: Annotated[str, Option(help="int8 or int4.")] = "int8",
    subfolder: Subfolder = "",
    overwrite: Overwrite = False,
) -> None:
    """Write a smaller copy of a fuser with integer weights. It answers as before, but cannot be trained.

    kvfuse quantize my-fuser my-small-fuser --weights int4
    """
    from kvfuse.checkpoint import quantize as run

    typer.echo(run(source, folder, weights, subfolder, overwrite=overwrite))


# Lists


@list_app.command()
def pairs() -> None:
    """List the authors' published pairs, with sources."""
    from kvfuse.published.pairs import PUBLISHED_PAIRS, REPOSITORY

    typer.echo(f"Fusers in {REPOSITORY}; load one with its name as subfolder.")
    for pair in PUBLISHED_PAIRS:
        typer.echo(pair)


@list_app.command()
def methods() -> None:
    """List the methods that evaluations compare, each with what answers."""
    from kvfuse.evaluation.describe_methods import lines

    typer.echo("\n".join(lines()))


@list_app.command()
def tasks() -> None:
    """List the tasks of evaluations."""
    from kvfuse.evaluation.tasks import task_names

    typer.echo("\n".join(task_names()))


@list_app.command()
def analyses() -> None:
    """List the analyses, each with the question that it answers."""
    from kvfuse.analysis.registry import ANALYSES, question

    for name in ANALYSES:
        typer.echo(f"{name:<16}{question(name)}")


# The embedded pair


@demo_app.callback()
def demo(
    context: typer.Context,
    ask: Annotated[str | None, Option(help="Ask one question, e.g. 'What currency is used in Norway?'")] = None,
    json: Annotated[Path | None, Option(help="Write all figures to this file.")] = None,
    seed: Annotated[list[int] | None, Option(help="Training seeds of the fusers to score. Default: all.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Maximum number of held-out questions.")] = None,
    pair: Annotated[Path | None, Option(help=f"Folder made by 'kvfuse demo build'. {EMBEDDED}")] = None,
) -> None:
    """Let the embedded pair answer its held-out questions with every method, side by side.

    kvfuse demo --ask "What currency is used in Norway?"
    """
    _hide_progress_bars()
    if context.invoked_subcommand is None:
        from kvfuse.demo.show import answer_one, run

        if ask is not None:
            answer_one(ask, pair)
        else:
            run(pair, json_file=json, seeds=seed, limit=limit)


@demo_app.command()
def build(folder: Annotated[Path, Argument(help="Folder for facts, models, fusers and figures.")]) -> None:
    """Build the embedded pair from nothing, in under 20 minutes on two cores. Needs the extra 'demo-build'.

    kvfuse demo build my-pair
    """
    from kvfuse.demo.build import build as run

    run(folder)


def _converse(conversation: "Conversation") -> None:
    """Ask until an empty line or the end of the input; what one question makes wrong does not end the conversation."""
    from kvfuse.errors import KVFuseError

    while question := _read_line("you: "):
        dropped = conversation.dropped
        try:
            answer = conversation.ask(question)
            if conversation.dropped > dropped:
                _say(f"the context is full; the oldest questions are no longer read, {conversation.dropped} so far")
            _print_pieces(answer)
        except KVFuseError as error:
            _say(f"error: {error}")


def _read_line(prompt: str) -> str:
    """Read a line, without the spaces around it; the end of the input is an empty one."""
    try:
        line = "" if sys.stdin is None else input(prompt).strip()
    except EOFError:
        line = ""
    if not (line and sys.stdin.isatty()):
        typer.echo(line)  # nobody pressed Enter behind the prompt
    return line


def _print_pieces(pieces: Iterable[str]) -> None:
    """Print an answer as it is generated, and end the line whatever happens."""
    started = False
    try:
        for piece in pieces:
            started = True
            typer.echo(piece, nl=False)
    finally:
        if started:
            typer.echo()


def _loading(dtype: str, device: str) -> dict[str, Any]:
    """The options for loading models that a command's ``--dtype`` and ``--device`` ask for."""
    from kvfuse.language_model import require_device

    return {"dtype": dtype, "device_map": require_device(device)}


def _hide_progress_bars() -> None:
    """Hide progress bars, in pipes and for pairs that download nothing. Must run before huggingface_hub is imported."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")


def _end_progress_bars() -> None:
    """Let progress bars that an error has left open end their lines."""
    if tqdm := sys.modules.get("tqdm"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _say(line: str) -> None:
    """Print a line that is no result."""
    typer.echo(line, err=True)


def main() -> None:
    """Entry point: an error that kvfuse raises on purpose, or a file system, becomes one line and exit status 2.

    Any other is a fault of kvfuse and stays a traceback. Ctrl-C ends with 130.
    """
    from kvfuse.errors import KVFuseError

    try:
        app()
    except KVFuseError as error:
        _end_progress_bars()
        _say(f"error: {error}")
        sys.exit(2)
    except OSError as error:
        if error.errno is None:  # not from the operating system
            raise
        _end_progress_bars()
        name = "" if error.filename is None else f"{error.filename}: "
        _say(f"error: expected a file or folder that can be used, got {name}{error.strerror}; choose another place")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
