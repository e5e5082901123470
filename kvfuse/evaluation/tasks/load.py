"""Tasks of the harness by name, from the Hub or from local files, with another template on request."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from kvfuse.errors import EvaluationError, first_line, nearest
from kvfuse.support.files import read_text

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent


def task_names() -> list[str]:
    """Returns kvfuse's own tasks: ``..._generate`` reads a written answer, ``..._options`` compares log-likelihoods of
    letters, ``..._cloze`` of the options' texts.
    """
    return sorted(file.stem for file in FOLDER.glob("[!_]*.yaml"))


def task_manager(harness_tasks: bool = False, **metadata: Any) -> "TaskManager":
    """Returns the harness's loader of tasks. Pass it to ``simple_evaluate``, which takes half a minute to make its own.

    Args:
        harness_tasks: Include the harness's own tasks.
        metadata: Arguments of :func:`kvfuse.evaluation.tasks.sources.load` for every task.

    Raises:
        EvaluationError: The harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError("expected the package lm-eval, got none; pip install 'kvfuse[eval]'") from error
    return TaskManager(include_path=str(FOLDER), include_defaults=harness_tasks, metadata=metadata)


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    template: str | Path | None = None,
    limit: int | None = None,
    only: str | list[str] | None = None,
    harness_tasks: bool = False,
    max_new_tokens: int | None = None,
) -> "Task | Group":
    """Returns a task as ``lm_eval.simple_evaluate(tasks=[...])`` takes it, with its questions loaded.

    Args:
        name: One of :func:`task_names`, or of the harness's own tasks.
        data_dir: Folder of the data's files, or one with a folder named like the data in it, e.g. ``mmlu-redux``; by
            default they come from the Hub. For kvfuse's own tasks only.
        template: A Jinja file in place of the task's prompt, with the variables ``question``, ``kind``, and for
            multiple choice ``choices`` and ``letters``.
        limit: Number of questions, from the first.
        only: Subjects, locales or kinds to ask about.
        harness_tasks: Include the harness's own tasks; finding them takes half a minute.
        max_new_tokens: Maximal length of an answer, in place of the task's own.

    Raises:
        EvaluationError: The task is unknown, its data are missing or wrong, or the template cannot be read.
    """
    # 1) find the task
    settings = {"data_dir": None if data_dir is None else str(data_dir), "limit": limit, "only": only}
    manager = task_manager(harness_tasks, **settings)
    if name not in manager.all_tasks:
        known, similar = ", ".join(task_names()), nearest(name, manager.all_tasks)
        raise EvaluationError(f"expected a task of {known}, got {name!r}; did you mean {similar!r}?")
    # 2) read its questions, then replace prompt and length
    with _without_notice():
        loaded = manager.load(name)
    text = None if template is None else _read_template(template)
    for task in loaded["tasks"].values():  # several in a group
        _set_prompt(task, text)
        if max_new_tokens is not None and task.config.generation_kwargs:
            task.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    return loaded.get("groups", {}).get(name) or loaded["tasks"][name]


@contextmanager
def _without_notice() -> Iterator[None]:
    """Drop the harness's notice about its own option ``--metadata``, for every data set that a function loads."""
    logger = logging.getLogger("lm_eval.api.task")

    def wanted(record: logging.LogRecord) -> bool:
        return "--metadata" not in record.getMessage()

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


class Template:
    """A prompt's template, compiled once; the harness would compile it for every question."""

    def __init__(self, text: str) -> None:
        from lm_eval.utils import env

        self.text, self.render = text, env.from_string(text).render

    def __call__(self, doc: dict[str, Any]) -> str:
        """Returns the prompt of a question."""
        return self.render(**doc)

    def __str__(self) -> str:
        """Returns the source, for the harness's records."""
        return self.text

    def __deepcopy__(self, memo: Any) -> "Template":
        """Returns itself: it is immutable, and compiled code cannot be copied."""
        return self


def _set_prompt(task: "Task", text: str | None) -> None:
    """Compile a task's template, or the given one; a function or a column stays as it is."""
    source = task.config.doc_to_text if text is None else text
    if isinstance(source, str) and source not in task.features:
        task.set_config("doc_to_text", Template(source))
        task.fewshot_cfg.doc_to_text = Template(source)


def _read_template(path: str | Path) -> str:
    try:
        text = read_text(Path(path))
        Template(text)
    except (OSError, ValueError, jinja2.TemplateError) as error:
        raise EvaluationError(f"expected a Jinja template in {path}, got: {first_line(error)}; correct it") from error
    return text
