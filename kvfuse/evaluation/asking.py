"""One method is asked one task, through lm-evaluation-harness, and what it answers becomes predictions."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.evaluation.harness.requests import from_chat, generation_options, options_key, to_prompt
from kvfuse.evaluation.predictions import Prediction
from kvfuse.methods import Method

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task

    from kvfuse.evaluation.harness.adapter import Failure
    from kvfuse.prompts.chat import Prompt

METRICS = ("acc", "score", "exact_match", "f1")
"""What makes an item's score, the first that a task has; else its first metric."""


def ask(
    method: Method,
    task: "Task | Group",
    name: str,
    seed: int | None,
    cache: Path,
    batch_size: int,
    chat: bool = True,
    quiet: bool = False,
) -> list[Prediction]:
    """Ask all questions of a task; those that a killed run has answered already are read from the cache.

    Args:
        method: Who answers.
        task: From :func:`kvfuse.evaluation.tasks.load_task`.
        name: What it is called in predictions.
        seed: Of the method's fuser, if it has one.
        cache: Folder for the answers of an unfinished run; gone at the end.
        batch_size: Questions at once.
        chat: Ask through chat templates.
        quiet: Show no progress.

    Returns:
        In the order of the task; in all processes but the first, nothing.
    """
    from lm_eval import evaluate
    from lm_eval.api.model import CachingLM

    from kvfuse.evaluation.harness.adapter import HarnessModel
    from kvfuse.evaluation.tasks import task_manager

    model = HarnessModel(method, batch_size, progress=not quiet)
    cached = CachingLM(model, str(cache / f"process-{model.rank}.db"))
    with _quietly():
        results = evaluate(cached, task_manager().load([task]), bootstrap_iters=0, apply_chat_template=chat)
    cached.dbdict.close()
    failures = model.gather_object(model.failures) or []
    model.barrier()
    if results is None:
        return []
    shutil.rmtree(cache)
    failed = {(one.task, one.doc_id): one for some in failures for one in some}
    samples = [(part, sample) for part, some in results["samples"].items() for sample in some]
    samples.sort(key=lambda one: (one[0], one[1]["doc_id"]))
    return [
        _prediction(name, part, sample, method.name, seed, failed.get((part, sample["doc_id"])))
        for part, sample in samples
    ]


def prompts_of(task: "Task | Group", chat: bool = True) -> Iterator[tuple[str, "Prompt", dict[str, Any]]]:
    """The questions that are answered by writing: id, prompt, and options of ``generate``.

    Args:
        task: As for :func:`ask`.
        chat: Likewise.
    """
    parts = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    for part in parts:
        part.build_all_requests(apply_chat_template=chat, chat_template=lambda messages, **_: from_chat(messages))
        for one in part.instances:
            if one.request_type == "generate_until":
                item = _item(part.config.task, one.doc, one.doc_id, len(parts) > 1)
                yield item, to_prompt(one.args[0]), generation_options(options_key(one))[1]


def _prediction(
    name: str, part: str, sample: dict[str, Any], method: str, seed: int | None, failure: "Failure | None"
) -> Prediction:
    doc = sample["doc"]
    answer, extracted, target = _read(sample)
    metrics = sample["metrics"]
    score = float(sample[next((metric for metric in METRICS if metric in metrics), metrics[0])])
    return Prediction(
        task=name,
        item=_item(part, doc, sample["doc_id"], part != name),
        method=method,
        prompt_hash=sample["prompt_hash"][:16],
        answer=answer,
        target=target,
        score=0.0 if failure else score,
        group=doc.get("group"),
        category=doc.get("kind") or (part if part != name else None),
        seed=seed,
        extracted=extracted or None,
        failed=failure.error if failure else None,
        question=_question(sample["arguments"][0][0]),
    )


def _read(sample: dict[str, Any]) -> tuple[str, str, str]:
    """What was answered, what was read out of it, and what is right."""
    doc, resps = sample["doc"], sample["resps"]
    letters = doc.get("letters")
    target = (
        letters[doc["answer"]]
        if letters and isinstance(doc.get("answer"), int)
        else str(doc.get("answer") or sample["target"])
    )
    if isinstance(resps[0][0], str):
        return resps[0][0], str(sample["filtered_resps"][0]), target
    best = max(range(len(resps)), key=lambda place: resps[place][0][0])
    letter = letters[best] if letters else str(best)
    return letter, letter, target


def _item(part: str, doc: dict[str, Any], doc_id: int, of_several: bool) -> str:
    item = str(doc.get("id") or doc_id)
    return f"{part}/{item}" if of_several else item


def _question(context: str) -> str:
    prompt = to_prompt(context)
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's account of what it does, line by line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
