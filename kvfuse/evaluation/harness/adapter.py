"""A method as a model of lm-evaluation-harness, whose tasks, few-shot examples, cache and result files are used as they are.

``python -m kvfuse.evaluation`` is the harness's own command line with this model and kvfuse's tasks known to it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook, hash_args
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from kvfuse.errors import EvaluationError
from kvfuse.evaluation.harness.requests import by_options, cut, from_chat, generation_options, options_key, to_prompt
from kvfuse.language_model import LanguageModel
from kvfuse.methods import Method, MethodContext, Single, find_method, make_method
from kvfuse.model import CacheToCache
from kvfuse.prompts.chat import Message
from kvfuse.support.processes import processes

NO_SCORE = -1e9
"""The log-likelihood of an option that could not be scored; lower than any, and still a number in JSON."""
Unit = tuple[str, list[int]]
"""A context and the requests that share it, by their places."""
Answerer = Callable[[Sequence[Unit]], list[list[Any]]]
"""Answers a batch: for each unit the results of its requests."""


@dataclass(frozen=True)
class Failure:
    """A question that could not be answered, asked in a batch and once more alone.

    Attributes:
        task: Name of its task.
        doc_id: Its place in the task.
        error: Kind and words of the last error.
    """

    task: str
    doc_id: int
    error: str


@register_model("kvfuse")
class HarnessModel(LM):
    """A method that the harness asks.

    Chats stay messages until a model reads them through its own template; without the harness's ``apply_chat_template``
    a prompt is plain text.

    Args:
        method: Who answers.
        batch_size: Prompts in a batch.
        progress: Show how far it is.

    Attributes:
        failures: Questions that this process could not answer, those of a run that its cache remembers included. Their
            answers are empty, and of options :data:`NO_SCORE`.
    """

    def __init__(self, method: Method, batch_size: int | str = 8, progress: bool = True) -> None:
        super().__init__()
        self.method, self.batch_size, self.progress = method, int(batch_size), progress
        self.failures: list[Failure] = []
        self.state = processes()
        self._rank, self._world_size, self._device = (
            self.state.process_index,
            self.state.num_processes,
            self.state.device,
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """What ``--model_args method=cache-to-cache,receiver=…,sharer=…,fuser=…`` says, and ``--batch_size``.

        ``--device`` is passed over, as the harness's own default is a GPU even where there is none; say ``device_map=…``.

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
        """Answers, cut at the first of the strings that a request names in ``until``."""
        answers: dict[int, str] = {}
        everything = self._everything("generate_until", requests)
        for key, places in by_options(requests).items():
            stops, options = generation_options(key)
            self.method.prepare([to_prompt(context) for context in everything[key]], **options)

            def answer(
                units: Sequence[Unit], stops: list[str] = stops, options: dict[str, Any] = options
            ) -> list[list[str]]:
                replies = self.method.generate([to_prompt(context) for context, _ in units], **options)
                return [[cut(reply.text, stops)] for reply in replies]

            units = [(requests[place].args[0], [place]) for place in places]
            answers |= self._ask("generate_until", requests, units, answer, "", len(everything[key]))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each continuation its log-probability after its context, and whether it is the greedy one."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            places[request.args[0]].append(place)
        everything = self._everything("loglikelihood", requests)[""]
        self.method.prepare([to_prompt(context) for context in everything])

        def answer(units: Sequence[Unit]) -> list[list[tuple[float, bool]]]:
            options = [[requests[place].args[1] for place in places] for _, places in units]
            scores = self.method.score([to_prompt(context) for context, _ in units], options)
            return [[(one.log_likelihood, one.greedy) for one in some] for some in scores]

        answers = self._ask("loglikelihood", requests, list(places.items()), answer, (NO_SCORE, False), len(everything))
        return [answers[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered: what a sharer knows of a text is not asked by scoring it whole. Raises EvaluationError."""
        raise EvaluationError(
            "expected a task with questions, got one about perplexity, which no method here answers; choose another"
        )

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The chat as JSON: each model reads it through a template of its own.

        Raises:
            EvaluationError: The task begins the answer itself (``gen_prefix``), behind which no template here goes on.
        """
        if not add_generation_prompt:
            raise EvaluationError(
                "expected a task that leaves the answer to the model, got one with gen_prefix; ask it without a chat"
            )
        return from_chat(chat_history)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which hold messages and no template."""
        return "kvfuse"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness's records."""
        return "each model's own"

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take the harness's ``use_cache``, and recall what failed in the run that it is from."""
        super().set_cache_hook(cache_hook)
        stored = () if cache_hook.dbdict is None else cache_hook.dbdict.values()
        self.failures += [Failure(**one["failure"]) for one in stored if isinstance(one, dict) and "failure" in one]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of all processes."""
        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Of all processes, at one of them."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        self.state.wait_for_everyone()

    def _everything(self, kind: str, requests: Sequence[Instance]) -> dict[str, list[str]]:
        """The contexts of a whole run by generation options, in the order of the questions.

        Those of other processes, and those that the cache has answered already, belong to it too: a control that hands one
        question's cache to another must not choose otherwise because a run was shared or killed.
        """
        asked = {(options_key(one), str(one.task_name), one.doc_id or 0, one.args[0]) for one in requests}
        tasks, stored = sorted({task for _, task, _, _ in asked}), self.cache_hook.dbdict
        known = set() if stored is None else {tuple(one) for one in stored.get(hash_args("run", [kind, *tasks]), [])}
        if not asked <= known:
            known |= asked if self.world_size == 1 else set(chain.from_iterable(self._gather_everywhere(asked)))
            self.cache_hook.add_partial("run", [kind, *tasks], sorted(known))
        contexts: dict[str, list[str]] = defaultdict(list)
        for key, _, _, context in sorted(known):
            contexts[key].append(context)
        return {key: list(dict.fromkeys(some)) for key, some in contexts.items()}

    def _gather_everywhere(self, asked: set[Any]) -> list[set[Any]]:
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, asked)
        return gathered

    def _ask(
        self, kind: str, requests: Sequence[Instance], units: list[Unit], answer: Answerer, none: Any, in_all: int
    ) -> dict[int, Any]:
        """Answer, the longest first, and write each answer into the harness's cache at once.

        Args:
            kind: Of the requests.
            requests: All of this process.
            units: What to answer.
            answer: How.
            none: The result of what fails.
            in_all: Contexts of the whole run.

        Raises:
            EvaluationError: Not one was answered, now or in a run before.
        """
        answers: dict[int, Any] = {}
        units, failed = sorted(units, key=lambda unit: -len(unit[0])), 0
        for (_, places), results in tqdm(
            ask(units, answer, self.batch_size),
            self.method.name,
            len(units),
            disable=not self.progress or self.rank > 0,
        ):
            failed += isinstance(results, Exception)
            if isinstance(results, Exception):
                self._record([requests[place] for place in places], results)
                answers.update((place, none) for place in places)
                continue
            for place, result in zip(places, results, strict=True):
                answers[place] = result
                self.cache_hook.add_partial(kind, requests[place].args, result)
        if units and failed == len(units) >= in_all // self.world_size:
            raise EvaluationError(
                f"expected answers by {self.method.name}, got none; the last error was {self.failures[-1].error}"
            )
        return answers

    def _record(self, requests: Sequence[Instance], error: Exception) -> None:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        for task, doc_id in dict.fromkeys((one.task_name, one.doc_id) for one in requests):
            failure = Failure(task, doc_id, words)
            self.failures.append(failure)
            self.cache_hook.add_partial("failure", [task, doc_id], {"failure": asdict(failure)})


def ask(units: Sequence[Unit], answer: Answerer, batch_size: int) -> Iterator[tuple[Unit, list[Any] | Exception]]:
    """Each unit with its results. Where a batch fails, each of it is asked alone once more; what fails again comes with its error."""
    for start in range(0, len(units), batch_size):
        batch = units[start : start + batch_size]
        try:
            yield from zip(batch, answer(batch), strict=True)
        except Exception:  # whatever it is, it concerns this batch and no other
            yield from ((unit, _ask_alone(unit, answer)) for unit in batch)


def _ask_alone(unit: Unit, answer: Answerer) -> list[Any] | Exception:
    try:
        return answer([unit])[0]
    except Exception as error:
        return error


def load_method(method: str = "cache-to-cache", **options: Any) -> Method:
    """A method by name, its models loaded from folders or the Hub; a model alone needs no fuser.

    Args:
        method: A key of :data:`kvfuse.methods.METHODS`, or an installed one.
        options: Of :meth:`CacheToCache.from_pretrained`, its models' included, and of :func:`kvfuse.methods.make_method`.

    Raises:
        MethodError, PairError: There is no such method, or it lacks something.
    """
    find_method(method)
    of_method = {field.name for field in fields(MethodContext)} - {"sharer"}
    settings = {name: options.pop(name) for name in of_method & options.keys()}
    if "fuser" not in options and method in options:  # the receiver or the sharer
        others = ("receiver", "sharer")
        return Single(
            method,
            LanguageModel.from_pretrained(options[method], **{k: v for k, v in options.items() if k not in others}),
        )
    return make_method(method, CacheToCache.from_pretrained(**options), **settings)
