"""A task of the harness by name: from the Hub or from local files, with another template where one is given."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from kvfuse.errors import EvaluationError, first_line, nearest

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parent


def task_names() -> list[str]:
    """The tasks that come with kvfuse: ``…_generate`` reads an answer off what is written, ``…_options`` compares log-likelihoods."""
    return sorted(file.stem for file in FOLDER.glob("[!_]*.yaml"))


def task_manager(harness_tasks: bool = False, **metadata: Any) -> "TaskManager":
    """What the harness loads tasks with; ``simple_evaluate`` needs it beside them, or it makes one of its own for half a minute.

    Args:
        harness_tasks: Know the harness's own tasks, too.
        metadata: What :func:`kvfuse.evaluation.tasks.sources.load` is told of each task.

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
    """A task as ``lm_eval.simple_evaluate(tasks=[...])`` takes it, its questions read.

    Args:
        name: One of :func:`task_names`, or of the harness's own tasks.
        data_dir: Folder of the data's files, or one that has them in a folder named like the data, e.g. ``mmlu-redux``; by
            default they come from the Hub. Of kvfuse's tasks only.
        template: A Jinja file in place of the task's prompt. It is given ``question``, ``kind``, and for multiple choice
            ``choices`` and ``letters``.
        limit: At most so many questions, the first.
        only: Subjects, locales or kinds to ask about.
        harness_tasks: Know the harness's own tasks, too; finding them takes half a minute.
        max_new_tokens: Longest answer, in place of the task's own.

    Raises:
        EvaluationError: There is no such task, its data are not there or not as they should be, or the template is none.
    """
    settings = {"data_dir": None if data_dir is None else str(data_dir), "limit": limit, "only": only}
    manager = task_manager(harness_tasks, **settings)
    if name not in manager.all_tasks:
        raise EvaluationError(
            f"expected a task of {', '.join(task_names())}, got {name!r}; did you mean {nearest(name, manager.all_tasks)!r}?"
        )
    loaded = manager.load(name)
    text = None if template is None else _read_template(template)
    for one in loaded["tasks"].values():
        ask = one.config.doc_to_text if text is None else text
        if isinstance(ask, str) and ask not in one.features:
            one.set_config("doc_to_text", Template(ask))
            one.fewshot_cfg.doc_to_text = Template(ask)
        if max_new_tokens is not None and one.config.generation_kwargs:
            one.set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
    return loaded.get("groups", {}).get(name) or loaded["tasks"][name]


class Template:
    """A prompt's template, compiled once; the harness compiles it for each question, which takes longer than the tiny models do."""

    def __init__(self, text: str) -> None:
        from lm_eval.utils import env

        self.text, self.render = text, env.from_string(text).render

    def __call__(self, doc: dict[str, Any]) -> str:
        """The prompt of one question."""
        return self.render(**doc)

    def __str__(self) -> str:
        """For the harness's records."""
        return self.text

    def __deepcopy__(self, memo: Any) -> "Template":
        """It never changes; compiled code cannot be copied."""
        return self


def _read_template(path: str | Path) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
        Template(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        raise EvaluationError(f"expected a Jinja template in {path}, got: {first_line(error)}; correct it") from error
    return text
