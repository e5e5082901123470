"""Where each task's questions come from: a data set on the Hub, or its files as they are found in a folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.errors import EvaluationError, first_line, nearest
from kvfuse.evaluation.tasks import items
from kvfuse.evaluation.tasks.items import Item
from kvfuse.support.rows import GZIP, JSON, TABLES, Row, decode, kind_of, read_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

READABLE = (*JSON, *TABLES)
SPLITS = ("train", "dev", "validation", "val", "test")
HELD_OUT = {"dev", "validation", "val"}


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        hub: Its name on the Hub.
        read: Makes a question of a row and of the subject that its file or configuration is named after; None for one
            that does not count.
        split: The one that is asked.
        config: Its configuration on the Hub; None where every subject is one, and all of them are read.
    """

    hub: str
    read: Callable[[Row, str], Item | None]
    split: str = "test"
    config: str | None = "default"


SOURCES = {
    "mmlu-redux": Source("edinburgh-dawg/mmlu-redux-2.0", items.mmlu_redux, config=None),
    "openbookqa": Source("allenai/openbookqa", items.openbookqa, config="main"),
    "arc-challenge": Source("allenai/ai2_arc", items.arc_challenge, config="ARC-Challenge"),
    "arc-easy": Source("allenai/ai2_arc", items.arc_easy, config="ARC-Easy"),
    "piqa": Source("ybisk/piqa", items.piqa, split="validation", config="plain_text"),
    "hellaswag": Source("Rowan/hellaswag", items.hellaswag, split="validation"),
    "boolq": Source("google/boolq", items.boolq, split="validation"),
    "ceval": Source("ceval/ceval-exam", items.ceval, split="val", config=None),
    "mmmlu": Source("openai/MMMLU", items.mmmlu, config=None),
    "mmlu-pro": Source("TIGER-Lab/MMLU-Pro", items.mmlu_pro),
    "gpqa-diamond": Source("Idavidrein/gpqa", items.gpqa, split="train", config="gpqa_diamond"),
    "gsm8k": Source("openai/gsm8k", items.gsm8k, config="main"),
    "math-500": Source("HuggingFaceH4/MATH-500", items.math500),
    "longbench": Source("Xnhyacinth/LongBench", items.longbench, config=None),
}


def load(
    source: str,
    data_dir: str | None = None,
    only: str | Sequence[str] | None = None,
    limit: int | None = None,
    subjects: Sequence[str] | None = None,
    **_: Any,
) -> "DatasetDict":
    """The questions of a task, as the harness asks a ``custom_dataset`` for them.

    Args:
        source: A key of :data:`SOURCES`.
        data_dir: See :func:`kvfuse.evaluation.tasks.load_task`.
        only: Kinds of question to keep, as the reader tells them: subjects, locales, lengths.
        limit: At most so many.
        subjects: Files or configurations to read; by default all.

    Raises:
        EvaluationError: No files are there, a row lacks a field, or nothing is left to ask.
    """
    where = SOURCES[source]
    rows = (
        _hub_rows(where, subjects)
        if data_dir is None
        else _file_rows(_find_files(Path(data_dir), source, where.split, subjects))
    )
    kinds = {only} if isinstance(only, str) else set(only or ())
    return as_dataset(islice(_kept(_items(rows, where), kinds), limit), source)


def as_dataset(questions: Iterable[Item], name: str) -> "DatasetDict":
    """Questions as the harness takes them. Raises EvaluationError where there are none."""
    from datasets import Dataset, DatasetDict

    rows = list(questions)
    if not rows:
        raise EvaluationError(f"expected questions of {name}, got none; check the data, and 'only' if it is given")
    return DatasetDict(test=Dataset.from_list(rows))


def _items(rows: Iterator[tuple[str, int, str, Row]], source: Source) -> Iterator[Item]:
    for file, line, subject, row in rows:
        try:
            item = source.read(row, subject)
        except KeyError as error:
            found = ", ".join(map(str, row))
            raise EvaluationError(
                f"expected the field {error.args[0]!r} in {file}, line {line}, got {found}; correct the file"
            ) from error
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise EvaluationError(
                f"expected a question in {file}, line {line}, got: {error}; correct the file"
            ) from error
        if item is not None:
            yield item


def _kept(questions: Iterator[Item], kinds: set[str]) -> Iterator[Item]:
    """The questions of some kinds, or of all. Raises EvaluationError, after the last, for a kind that did not occur."""
    seen: set[str] = set()
    for item in questions:
        seen.add(item["kind"])
        if not kinds or item["kind"] in kinds:
            yield item
    for kind in kinds - seen:
        raise EvaluationError(
            f"expected a kind of question that the data have, got {kind!r}; "
            f"did you mean {nearest(kind, sorted(seen))!r}?"
        )


def _hub_rows(source: Source, subjects: Sequence[str] | None) -> Iterator[tuple[str, int, str, Row]]:
    import datasets

    try:
        configs = (
            [source.config]
            if source.config
            else subjects or set(datasets.get_dataset_config_names(source.hub)) - {"default"}
        )
        for config in sorted(configs):
            rows = datasets.load_dataset(source.hub, config, split=source.split)
            yield from ((f"{source.hub}/{config}", number, config, row) for number, row in enumerate(rows, start=1))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # a lost connection is an OSError
        raise EvaluationError(
            f"expected the data set {source.hub} on the Hub, got: {first_line(error)}; "
            "connect to it, or name a folder with its files, --data DIR"
        ) from error


def _find_files(folder: Path, name: str, split: str, subjects: Sequence[str] | None) -> list[Path]:
    """The files of a split: those named after it or in a folder that is, else all that are not named after another."""
    folder = folder / name if (folder / name).is_dir() else folder
    files = sorted(file for file in folder.rglob("*") if kind_of(file) in READABLE)
    if subjects is not None:
        files = [file for file in files if _subject(file) in subjects]
    # The words of split names in each file's path
    words = {file: _split_words(file, folder) for file in files}
    of_split = [file for file in files if split in words[file]]
    if not of_split and split in HELD_OUT:  # the same split by another name
        of_split = [file for file in files if words[file] & HELD_OUT]
    chosen = of_split or [file for file in files if not words[file]]
    if not chosen:
        raise EvaluationError(
            f"expected files of {name}, split {split}, in {folder}, got none of {', '.join(READABLE)}; check the folder"
        )
    return chosen


def _split_words(file: Path, folder: Path) -> set[str]:
    words = "_".join([*file.relative_to(folder).parent.parts, _stem(file)]).replace("-", "_").split("_")
    return set(SPLITS) & {word.lower() for word in words}


def _subject(file: Path) -> str:
    """``law`` of ``law_val.csv``."""
    stem = _stem(file)
    name, _, last = stem.rpartition("_")
    return name if last in SPLITS else stem


def _stem(file: Path) -> str:
    """``law_val`` of ``law_val.csv`` and ``law_val.csv.gz``."""
    return file.name.removesuffix(GZIP).removesuffix(kind_of(file))


def _file_rows(files: Sequence[Path]) -> Iterator[tuple[str, int, str, Row]]:
    for file in files:
        try:
            for line, content in read_rows(file):
                yield str(file), line, _subject(file), decode(file.name, content)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"expected rows in {file}, got: {first_line(error)}; correct the file") from error
