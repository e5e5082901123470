"""A method behind the harness answers as it does without, and as the harness's own model of transformers does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import IN_TWO

pytest.importorskip("lm_eval")
from lm_eval import evaluate as harness_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model

from kvfuse.errors import EvaluationError, MethodError, PairError
from kvfuse.evaluation.harness.adapter import HarnessModel
from kvfuse.evaluation.tasks import task_manager
from kvfuse.evaluation.tasks.readouts import NO_SCORE
from kvfuse.methods import Fused, Method, Single
from kvfuse.methods.base import OptionScore, Reply

pytestmark = pytest.mark.usefixtures("quiet_logs")
QUESTIONS = [
    "What is the capital of Norway?",
    "Two models read",
    "Which language do people speak in Rotterdam?",
    "def fuse",
    "6 7 8",
]


class Recorder(Method):
    """Answers with the prompt's length; what it is told to break on, it breaks on."""

    name = "recorder"

    def __init__(self, breaks=lambda prompts: False):
        self.breaks, self.asked, self.prepared, self.options = breaks, [], [], {}

    def prepare(self, prompts, **options):
        self.prepared.append(list(prompts))

    def reply(self, prompts, **options):
        self.options = options
        if self.breaks(prompts):
            raise RuntimeError("out of\nmemory")
        self.asked.append(list(prompts))
        return [Reply(f"{len(str(prompt))} letters. Or more", 1, 1) for prompt in prompts]

    def score(self, prompts, options):
        if self.breaks(prompts):
            raise RuntimeError("out of memory")
        self.asked.append(list(prompts))
        lengths = [
            [len(prompt) + len(option) for option in some] for prompt, some in zip(prompts, options, strict=True)
        ]
        return [[OptionScore(-float(length), False, 1) for length in some] for some in lengths]


def generations(contexts, task="task", **options):
    return [
        Instance("generate_until", {}, (context, dict(options)), 0, (task, i, 1)) for i, context in enumerate(contexts)
    ]


def scorings(contexts, choices):
    return [
        Instance("loglikelihood", {}, (c, choice), k, ("task", i, 1))
        for i, c in enumerate(contexts)
        for k, choice in enumerate(choices)
    ]


def in_memory(output_type, questions=QUESTIONS, **fields):
    """A task of the harness about some questions, its answers of no matter."""
    from datasets import Dataset, DatasetDict

    rows = [{"question": question, "answer": "0"} for question in questions]
    common = {
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": " ",
    }
    data = {"custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(rows))}
    return {"task": f"in-memory-{output_type}", "output_type": output_type, **common, **data, **fields}


GENERATION = in_memory("generate_until", generation_kwargs={"max_gen_toks": 12, "until": ["?"], "do_sample": False})
CHOICE = in_memory("multiple_choice", doc_to_choice=["Oslo", "the same question", "speak Dutch there"], doc_to_target=0)


def evaluate(model, *tasks):
    """What ``simple_evaluate`` does, without the three seconds in which it describes the machine."""
    results = harness_evaluate(model, task_manager().load(list(tasks)), bootstrap_iters=0)
    return results and results["samples"]


@pytest.fixture(scope="module")
def stock(receiver):
    """The harness's own model of transformers, around the tiny receiver."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=receiver.model, tokenizer=receiver.tokenizer, backend="causal", max_length=256, batch_size=2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_model_answers_and_scores_as_in_the_harness(stock, receiver, batch_size):
    model = HarnessModel(Single("receiver", receiver), batch_size, progress=False)
    found, expected = evaluate(model, GENERATION, CHOICE), evaluate(stock, GENERATION, CHOICE)
    for one, other in zip(found[GENERATION["task"]], expected[GENERATION["task"]], strict=True):
        assert one["resps"][0][0] == other["resps"][0][0].strip()
        assert one["prompt_hash"] == other["prompt_hash"]
    for one, other in zip(found[CHOICE["task"]], expected[CHOICE["task"]], strict=True):
        for (likelihood, greedy), (stock_likelihood, stock_greedy) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(likelihood) == pytest.approx(float(stock_likelihood), abs=1e-4)
            assert greedy == stock_greedy


def test_chats_reach_each_model_through_its_own_template(pair):
    model = HarnessModel(Fused(pair), 2, progress=False)
    chats = [[{"role": "system", "content": "s"}, {"role": "user", "content": question}] for question in QUESTIONS]
    contexts = [model.apply_chat_template(chat) for chat in chats]
    answers = model.generate_until(generations(contexts, max_gen_toks=8))
    assert answers == [
        answer.text for chat in chats for answer in Fused(pair).generate([chat], max_new_tokens=8, do_sample=False)
    ]
    with pytest.raises(EvaluationError, match="gen_prefix"):
        model.apply_chat_template(chats[0], add_generation_prompt=False)


def test_requests_are_grouped_by_options_and_answered_in_order():
    method = Recorder()
    model = HarnessModel(method, 2, progress=False)
    short = generations(QUESTIONS[:3], max_gen_toks=4, until="Or", temperature=0.0)
    long = generations(QUESTIONS[3:], max_gen_toks=9, until=[], do_sample=True, temperature=0.5)
    answers = model.generate_until([short[0], long[0], short[1], long[1], short[2]])
    order = [QUESTIONS[0], QUESTIONS[3], QUESTIONS[1], QUESTIONS[4], QUESTIONS[2]]
    endings = [" letters. ", " letters. Or more"]
    assert answers == [f"{len(question)}{endings[QUESTIONS.index(question) > 2]}" for question in order]
    assert [len(batch) for batch in method.asked] == [2, 1, 2]
    assert method.asked[0] == [QUESTIONS[2], QUESTIONS[0]]  # the longest first
    assert method.options == {"max_new_tokens": 9, "do_sample": True, "temperature": 0.5}
    assert method.prepared == [QUESTIONS[:3], QUESTIONS[3:]]


def test_options_of_one_context_are_scored_together():
    method = Recorder()
    scores = HarnessModel(method, 2, progress=False).loglikelihood(scorings(QUESTIONS, ["a", "bc"]))
    assert scores == [(-float(len(question) + n), False) for question in QUESTIONS for n in (1, 2)]
    assert sorted(prompt for batch in method.asked for prompt in batch) == sorted(QUESTIONS)
    assert method.prepared == [QUESTIONS]


def test_a_batch_that_fails_is_asked_one_by_one():
    model = HarnessModel(Recorder(lambda prompts: len(prompts) > 1), 4, progress=False)
    one_by_one = HarnessModel(Recorder(), 1, progress=False)
    assert model.generate_until(generations(QUESTIONS)) == one_by_one.generate_until(generations(QUESTIONS))
    assert model.failures == []


def test_what_fails_alone_too_counts_as_failed_and_is_told():
    model = HarnessModel(Recorder(lambda prompts: QUESTIONS[1] in prompts), 4, progress=False)
    answers = model.generate_until(generations(QUESTIONS))
    assert [not answer for answer in answers] == [False, True, False, False, False]
    assert [(one.doc_id, one.error) for one in model.failures] == [(1, "RuntimeError: out of memory")]
    assert model.loglikelihood(scorings(QUESTIONS, ["a", "b"]))[2:4] == [(NO_SCORE, False)] * 2
    assert len(model.failures) == 2  # one more, not one for each option


def test_a_run_that_answers_nothing_stops():
    with pytest.raises(EvaluationError, match="out of memory"):
        HarnessModel(Recorder(lambda prompts: True), progress=False).generate_until(generations(QUESTIONS))


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_may_find_nothing_but_failures(tmp_path):
    model = HarnessModel(Recorder(lambda prompts: QUESTIONS[0] in prompts), progress=False)
    cached = CachingLM(model, str(tmp_path / "cache"))
    requests = generations(QUESTIONS)
    cached.cache_hook.add_partial(
        "run", ["generate_until", "task"], [("{}", "task", i, question) for i, question in enumerate(QUESTIONS)]
    )
    assert model.generate_until(requests[:1]) == [""]


def test_perplexity_is_refused():
    with pytest.raises(EvaluationError, match="perplexity"):
        HarnessModel(Recorder(), progress=False).loglikelihood_rolling([])


@pytest.mark.filterwarnings("ignore")
def test_a_killed_run_goes_on_and_prepares_as_the_first(tmp_path):
    def kill(prompts):
        if QUESTIONS[3] in prompts:
            raise KeyboardInterrupt

    cache = str(tmp_path / "cache")
    first = Recorder(lambda prompts: QUESTIONS[0] in prompts or kill(prompts))
    with pytest.raises(KeyboardInterrupt):
        evaluate(CachingLM(HarnessModel(first, 1, progress=False), cache), GENERATION)
    second = Recorder(lambda prompts: QUESTIONS[0] in prompts)
    evaluate(CachingLM(HarnessModel(second, 1, progress=False), cache), GENERATION)
    assert sorted(first.asked + second.asked) == sorted(
        [question] for question in QUESTIONS if question != QUESTIONS[0]
    )
    assert first.prepared == second.prepared == [QUESTIONS]
    third = HarnessModel(Recorder(), 1, progress=False)
    samples = evaluate(CachingLM(third, cache), GENERATION)[GENERATION["task"]]
    assert third.method.asked == []
    assert third.failures[0].doc_id == 0
    assert samples[0]["resps"] == [[""]]


def test_the_harness_finds_it_by_name(saved_models):
    model = get_model("kvfuse").create_from_arg_string(
        f"method=sharer,sharer={saved_models / 'sharer'}", {"batch_size": 3, "device": "cpu"}
    )
    assert (model.method.name, model.batch_size, model.rank, model.world_size) == ("sharer", 3, 0, 1)
    with pytest.raises(MethodError, match="did you mean 'sharer'"):
        get_model("kvfuse").create_from_arg_string("method=sharers")
    with pytest.raises(PairError, match="at least one fuser"):
        get_model("kvfuse").create_from_arg_obj({"method": "receiver"})


def test_a_method_of_two_models_is_made_with_its_options():
    data = Path(__file__).parents[1] / "kvfuse" / "demo" / "data"
    words = (
        f"method=hybrid,receiver={data / 'receiver'},sharer={data / 'sharer'},fuser={data / 'fuser-0'},hint_tokens=7"
    )
    method = get_model("kvfuse").create_from_arg_string(words).method
    assert (method.name, method.hint_tokens) == ("hybrid", 7)


SHARED_RUN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_harness import GENERATION, CHOICE, HarnessModel, Recorder, evaluate
model = HarnessModel(Recorder(), 2, progress=False)
samples = evaluate(model, GENERATION, CHOICE)
if samples:
    samples = {name: sorted((one["doc_id"], one["filtered_resps"]) for one in some) for name, some in samples.items()}
    json.dump({"samples": samples, "prepared": model.method.prepared}, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
def test_two_processes_share_the_questions_with_the_same_result(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SHARED_RUN)
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": str(here.parent), "ACCELERATE_USE_CPU": "true"}
    for name, start in (("one", [sys.executable]), ("two", IN_TWO)):
        subprocess.run(
            [*start, str(script), str(here), str(tmp_path / name)], env=env, check=True, capture_output=True, text=True
        )
    assert json.loads((tmp_path / "one").read_text()) == json.loads((tmp_path / "two").read_text())


@pytest.mark.slow
def test_the_harness_command_line(saved_models, tmp_path):
    arguments = [
        "--model",
        "kvfuse",
        "--model_args",
        f"method=receiver,receiver={saved_models / 'receiver'}",
        "--limit",
        "2",
    ]
    words = [*arguments, "--tasks", "embedded_generate", "--apply_chat_template", "--output_path", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-m", "kvfuse.evaluation", *words], env=env, check=True, capture_output=True, text=True
    )
    assert "embedded_generate" in ran.stdout
