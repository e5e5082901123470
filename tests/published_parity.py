"""Compare kvfuse with what the reference computed: ``python tests/published_parity.py DIR``.

DIR holds ``receiver``, ``sharer_<k>``, ``fuser_<k>`` and ``expected.safetensors``, or folders that do.
Prints the largest differences as JSON; exits with 1 if one exceeds 1e-5 or a token differs.
"""

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvfuse.cache.transformers_cache import CACHE, read_cache
from kvfuse.checkpoint import load_fuser
from kvfuse.language_model import LanguageModel
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import from_ids
from kvfuse.stages.decode import decode
from kvfuse.testing import tiny_tokenizer

BAR = 1e-5


def load(folder):
    """The models and all fusers of a folder; the prompts are ids, so the tokenizer plays no part."""
    count = len(list(folder.glob("fuser_*")))
    names = ["receiver", *(f"sharer_{k}" for k in range(count))]
    models = [AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval() for name in names]
    receiver, *sharers = (LanguageModel(model, tiny_tokenizer()) for model in models)
    return receiver, sharers, [load_fuser(folder / f"fuser_{k}", dtype=torch.float32) for k in range(count)]


def in_mode(receiver, sharers, fusers, mode):
    """The pair as the reference ran it."""
    pair = CacheToCache(receiver, sharers, fusers, fusion="sequential" if mode == "sequential" else "parallel")
    return pair.select({"only_first": 0, "only_second": 1}[mode]) if mode.startswith("only_") else pair


def largest(ours, theirs):
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")


@torch.no_grad()
def compare(pair, ids, expected):
    """Largest absolute differences of one prompt in one mode, and whether the greedy tokens are equal."""
    prompt = from_ids(ids, len(pair.sharers))
    model = pair.receiver.model
    fused = read_cache(pair.prefill(prompt))
    logits = model(ids[:, -1:], **{CACHE: pair.prefill(prompt)}).logits[:, -1]
    new = expected["generated_ids"].shape[1] - ids.shape[1]
    generated = decode(model, prompt.ids, prompt.mask, pair.prefill(prompt), max_new_tokens=new, do_sample=False)
    return {
        "fused_keys": largest(fused.key, expected["fused_keys"]),
        "fused_values": largest(fused.value, expected["fused_values"]),
        "last_logits": largest(logits, expected["last_logits"]),
        "tokens_equal": torch.equal(generated, expected["generated_ids"]),
    }


def check(folder):
    """All prompts and modes of one folder: ``{"case0.parallel": {...}}``."""
    expected, models = load_file(folder / "expected.safetensors"), load(folder)
    results = {}
    for case, mode in sorted(
        {match.groups() for name in expected if (match := re.match(r"(\w+)\.(\w+)\.fused_keys", name))}
    ):
        wanted = {
            name.rpartition(".")[2]: value for name, value in expected.items() if name.startswith(f"{case}.{mode}.")
        }
        results[f"{case}.{mode}"] = compare(in_mode(*models, mode), expected[f"{case}.prompt_ids"], wanted)
    return results


def passes(result):
    return result["tokens_equal"] and max(value for name, value in result.items() if name != "tokens_equal") <= BAR


def main(place):
    folders = sorted(path.parent for path in Path(place).rglob("expected.safetensors"))
    results = {folder.name: check(folder) for folder in folders}
    print(json.dumps(results, indent=2))
    return 0 if results and all(passes(result) for modes in results.values() for result in modes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
