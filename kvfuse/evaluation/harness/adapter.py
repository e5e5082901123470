"""A method as a model of lm-evaluation-harness, which provides tasks, few-shot examples, caching and result files.

``python -m kvfuse.evaluation`` is the harness's own command line with this model and kvfuse's tasks registered.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook, hash_args
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.asking import in_batches
from kvfuse.evaluation.harness.requests import (
    cut,
    from_chat,
    generation_options,
    group_by,
    load_method,
    options_key,
    to_prompt,
)
from kvfuse.evaluation.tasks.readouts import NO_SCORE
from kvfuse.methods import Method
from kvfuse.prompts.messages import Message
from kvfuse.support.processes import processes

Unit = tuple[str, list[int]]
"""A context and the indices of the requests that share it, which are answered together."""
AnswerUnits = Callable[[Sequence[Unit]], list[list[Any]]]
"""Answers a batch: returns for each unit the results of its requests."""


@dataclass(frozen=True)
class Failure:
    """A question that could not be answered, neither in a batch nor alone.

    Attributes:
        task: Name of its task.
        doc_id: Its index in the task.
        error: Class and message of the last error.
    """

    task: str
    doc_id: int
    error: str


@register_model("kvfuse")
class HarnessModel(LM):
    """A method that the harness can evaluate.

    Chats stay messages until a model reads them through its own template; without the harness's ``apply_chat_template``
    a prompt is plain text.

    Args:
        method: Answers.
        batch_size: Number of prompts per batch.
        progress: Show a progress bar.

    Attributes:
        failures: Questions that this process could not answer, also in the run that it continues. Their answers are
            empty, the scores of their options :data:`NO_SCORE`.
    """

    def __init__(self, method: Method, batch_size: int | str = 8, progress: bool = True) -> None:
        super().__init__()
        self.method, self.batch_size, self.progress = method, int(batch_size), progress
        self.failures: list[Failure] = []
        self.state = state = processes()
        self._rank, self._world_size, self._device = state.process_index, state.num_processes, state.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Make a model of ``--model_args method=...,receiver=...,sharer=...,fuser=...`` and ``--batch_size``.

        ``--device`` is ignored, since the harness's default is a GPU even where there is none; use ``device_map=...``.

        Raises:
            MethodError, PairError: See :func:`load_method`.
        """
        batch_size = (additional_config or {}).get("batch_size") or 8
        return cls(load_method(**{"device_map": processes().device, **arg_dict}), batch_size)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "HarnessModel":
        """See :meth:`create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the answers, cut at the first of the strings that a request lists in ``until``."""
        answers: dict[int, str] = {}
        # requests with the same options can share a batch
        contexts = self._contexts_of_run("generate_until", requests)
        for key, indices in group_by(requests, options_key).items():
            stops, options = generation_options(key)
            self.method.prepare(list(map(to_prompt, contexts[key])), **options)
            units = [(requests[index].args[0], [index]) for index in indices]
            generate = partial(self._generate, stops=stops, options=options)
            answers |= self._answer("generate_until", requests, units, generate, "", len(contexts[key]))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability after its context, and whether it is the greedy one."""
        # each context is read once, with all of its continuations
        indices = group_by(requests, lambda request: request.args[0])
        contexts = self._contexts_of_run("loglikelihood", requests)[""]
        self.method.prepare(list(map(to_prompt, contexts)))
        score, failed = partial(self._score, requests=requests), (NO_SCORE, False)
        answers = self._answer("loglikelihood", requests, list(indices.items()), score, failed, len(contexts))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raises EvaluationError: perplexities are not offered, since no sharer is asked anything for them."""
        raise EvaluationError(
            "expected a task with questions, got one about perplexity, which no method here answers; choose another"
        )

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Returns the chat as JSON: each model reads it through its own template.

        Raises:
            EvaluationError: The task begins the answer itself (``gen_prefix``), which templates cannot continue.
        """
        if not add_generation_prompt:
            raise EvaluationError(
                "expected a task that leaves the answer to the model, got one with gen_prefix; ask it without a chat"
            )
        return from_chat(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of the harness's request cache, whose requests hold messages and no template."""
        return "kvfuse"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template in the harness's records."""
        return "each model's own"

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use the harness's ``use_cache``, and recall the failures of the run that it is from."""
        super().set_cache_hook(cache_hook)
        stored = () if cache_hook.dbdict is None else cache_hook.dbdict.values()
        self.failures += [
            Failure(**value["failure"]) for value in stored if isinstance(value, dict) and "failure" in value
        ]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the tensors of all processes."""
        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """Returns the objects of all processes, in every process."""
        return gather_object([obj])

    def barrier(self) -> None:
        """Wait for all processes."""
        self.state.wait_for_everyone()

    def _generate(self, units: Sequence[Unit], *, stops: list[str], options: dict[str, Any]) -> list[list[str]]:
        answers = self.method.generate([to_prompt(context) for context, _ in units], **options)
        return [[cut(answer.text, stops)] for answer in answers]

    def _score(self, units: Sequence[Unit], *, requests: Sequence[Instance]) -> list[list[tuple[float, bool]]]:
        options = [[requests[index].args[1] for index in indices] for _, indices in units]
        scores = self.method.score([to_prompt(context) for context, _ in units], options)
        return [[(score.log_likelihood, score.greedy) for score in row] for row in scores]

    def _contexts_of_run(self, kind: str, requests: Sequence[Instance]) -> dict[str, list[str]]:
        """Returns all contexts of the run by generation options, in the order of the questions.

        They include those of other processes and those that the cache has answered already: a control that gives one
        question's cache to another must choose the same ones whether or not a run was shared or killed.
        """
        asked = {(options_key(row), str(row.task_name), row.doc_id or 0, row.args[0]) for row in requests}
        key = [kind, *sorted({task for _, task, _, _ in asked})]
        # 1) those that the run was begun with, from the cache
        stored = self.cache_hook.dbdict
        known = set() if stored is None else {tuple(row) for row in stored.get(hash_args("run", key), [])}
        # 2) at the start of a run those of all processes, from them
        if not asked <= known:
            known |= set(gather_object(sorted(asked)))
            self.cache_hook.add_partial("run", key, sorted(known))
        # 3) each context once
        contexts: dict[str, dict[str, None]] = defaultdict(dict)
        for options, _, _, context in sorted(known):
            contexts[options][context] = None
        return {options: list(found) for options, found in contexts.items()}

    def _answer(
        self, kind: str, requests: Sequence[Instance], units: list[Unit], answer: AnswerUnits, failed: Any, in_run: int
    ) -> dict[int, Any]:
        """Answer in batches, and write each answer into the harness's cache at once.

        Args:
            kind: Of the requests.
            requests: All of this process.
            units: To answer.
            answer: Answers a batch of units.
            failed: The result of a request that fails.
            in_run: Number of contexts of the whole run.

        Raises:
            EvaluationError: Nothing was answered, neither now nor in the run that this one continues.
        """
        answers: dict[int, Any] = {}
        lengths, num_failed = [len(context) for context, _ in units], 0
        batches = in_batches(lengths, lambda chosen: answer([units[unit] for unit in chosen]), self.batch_size)
        hidden = not self.progress or self.rank > 0 or None  # None: hidden in pipes
        for unit, results in tqdm(batches, self.method.name, len(units), disable=hidden):
            _, indices = units[unit]
            if isinstance(results, Exception):  # counts as wrong, and is listed in the report
                self._record([requests[index] for index in indices], results)
                answers.update((index, failed) for index in indices)
                num_failed += 1
                continue
            for index, result in zip(indices, results, strict=True):
                answers[index] = result
                self.cache_hook.add_partial(kind, requests[index].args, result)
        # a continued run may have only failures left; a whole run of failures is a wrong set-up
        if units and num_failed == len(units) >= in_run // self.world_size:
            raise EvaluationError(
                f"expected answers by {self.method.name}, got none; the last error was {self.failures[-1].error}"
            )
        return answers

    def _record(self, requests: Sequence[Instance], error: Exception) -> None:
        # one line per question, however many options it has
        message = " ".join(f"{type(error).__name__}: {error}".split())
        for task, doc_id in dict.fromkeys((request.task_name, request.doc_id) for request in requests):
            failure = Failure(task, doc_id, message)
            self.failures.append(failure)
            self.cache_hook.add_partial("failure", [task, doc_id], {"failure": asdict(failure)})
