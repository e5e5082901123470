"""Evaluate one method on one task through lm-evaluation-harness, and turn the harness's samples into predictions."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.evaluation.asking import TimedQuestion, question_text
from kvfuse.evaluation.harness.requests import from_chat, generation_options, options_key, to_prompt
from kvfuse.evaluation.predictions import Prediction
from kvfuse.methods import Method

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

METRICS = ("acc", "score", "exact_match", "f1")
"""The metric that makes an item's score: the first of these that a task has, else the task's first."""


def evaluate_task(
    method: Method,
    task: "Task | Group",
    name: str,
    seed: int | None,
    cache: Path,
    batch_size: int,
    *,
    chat: bool = True,
    quiet: bool = False,
) -> list[Prediction]:
    """Ask all questions of a task, except those that a killed run has answered and cached.

    Args:
        method: Answers.
        task: From :func:`kvfuse.evaluation.tasks.load_task`.
        name: Of the task in the predictions.
        seed: Of the method's fuser, if it has one.
        cache: Folder for the answers of an unfinished run, removed at the end.
        batch_size: Number of questions per batch.
        chat: Ask through chat templates.
        quiet: Show no progress.

    Returns:
        The predictions in the order of the task; an empty list in all processes but the first.
    """
    from lm_eval import evaluate
    from lm_eval.api.model import CachingLM

    from kvfuse.evaluation.harness.adapter import HarnessModel
    from kvfuse.evaluation.tasks import task_manager

    # 1) the harness asks
    model = HarnessModel(method, batch_size, progress=not quiet)
    caching = CachingLM(model, str(cache / f"process-{model.rank}.db"))
    with _quietly():
        results = evaluate(caching, task_manager().load([task]), bootstrap_iters=0, apply_chat_template=chat)
    caching.dbdict.close()
    # 2) the first process collects
    failures = model.gather_object(model.failures)
    model.barrier()
    if results is None:
        return []
    shutil.rmtree(cache)
    errors = {(failure.task, failure.doc_id): failure.error for of_process in failures for failure in of_process}
    samples = [(part, sample) for part, of_part in results["samples"].items() for sample in of_part]
    # with several processes, samples come in any order
    samples.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    return [
        _prediction(name, part, sample, method.name, seed, errors.get((part, sample["doc_id"])))
        for part, sample in samples
    ]


def prompts_of(task: "Task | Group", chat: bool = True) -> Iterator[TimedQuestion]:
    """Yields the questions that are answered by generation.

    Args:
        task: As for :func:`evaluate_task`.
        chat: As for :func:`evaluate_task`.
    """
    parts = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    for part in parts:
        # as the harness does when it asks, so that ids and prompts are those of the predictions
        part.build_all_requests(apply_chat_template=chat, chat_template=lambda messages, **_: from_chat(messages))
        for request in part.instances:
            if request.request_type == "generate_until":
                item = _item(part.config.task, request.doc, request.doc_id, len(parts) > 1)
                yield item, to_prompt(request.args[0]), generation_options(options_key(request))[1]


def _prediction(
    name: str, part: str, sample: dict[str, Any], method: str, seed: int | None, error: str | None
) -> Prediction:
    doc, metrics = sample["doc"], sample["metrics"]
    answer, extracted = _answer(sample)
    metric = next((metric for metric in METRICS if metric in metrics), metrics[0])
    return Prediction(
        task=name,
        item=_item(part, doc, sample["doc_id"], part != name),
        method=method,
        prompt_hash=sample["prompt_hash"][:16],
        answer=answer,
        target=_target(sample),
        score=0.0 if error else float(sample[metric]),
        group=doc.get("group"),
        category=doc.get("kind") or (part if part != name else None),
        seed=seed,
        extracted=extracted or None,
        failed=error,
        question=question_text(to_prompt(sample["arguments"][0][0])),
    )


def _answer(sample: dict[str, Any]) -> tuple[str, str]:
    """Returns the answer, and what was extracted from it; of scored options the letter of the likeliest."""
    responses, letters = sample["resps"], sample["doc"].get("letters")
    if isinstance(responses[0][0], str):
        return responses[0][0], str(sample["filtered_resps"][0])
    # several responses are the scores of options
    best = max(range(len(responses)), key=lambda index: responses[index][0][0])
    letter = letters[best] if letters else str(best)
    return letter, letter


def _target(sample: dict[str, Any]) -> str:
    answer, letters = sample["doc"].get("answer"), sample["doc"].get("letters")
    return letters[answer] if letters and isinstance(answer, int) else str(answer or sample["target"])


def _item(part: str, doc: dict[str, Any], doc_id: int, of_several: bool) -> str:
    item = str(doc.get("id") or doc_id)
    return f"{part}/{item}" if of_several else item


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the harness's log of its steps."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
