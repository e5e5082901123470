import math

import numpy as np
import pytest
import torch

from kvfuse.analysis.effective_rank import Gram, caches, effective_rank, run
from kvfuse.analysis.readout import read
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([1.0] * 7, 7.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        ([3.0, 1.0], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))),
        ([0.5**i for i in range(1, 60)], 4.0),  # entropy of the geometric distribution with p = 1/2: 2 bits
        ([0.0, 0.0], 0.0),
    ],
)
def test_known_spectra(spectrum, rank):
    values = torch.tensor(spectrum, dtype=torch.float64)
    assert float(effective_rank(values)) == pytest.approx(rank, rel=1e-6)
    assert float(effective_rank(17 * values.flip(0))) == pytest.approx(rank, rel=1e-6)


def matrix(spectrum, rows, seed=0):
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(rows, len(spectrum))))
    right, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return torch.tensor(left * np.array(spectrum) @ right)


def as_kv(x, heads=2):
    """``(tokens, C)`` as the keys and values of one layer and row."""
    part = x.unflatten(-1, (heads, -1)).transpose(0, 1)[None, None]
    return KV(part, part.flip(-1))


def test_matrices_of_known_spectrum_in_pieces_and_under_padding():
    spectrum = [4.0, 4.0, 2.0, 1.0, 0.0, 0.0]
    x = matrix(spectrum, 50)
    gram = Gram()
    gram.add(as_kv(x[:20]), torch.ones(1, 20))
    padded = torch.cat([torch.full((7, 6), 99.0, dtype=x.dtype), x[20:]])
    gram.add(as_kv(padded), (torch.arange(37) >= 7)[None].long())
    figures, rank = gram.to_dict(), float(effective_rank(torch.tensor(spectrum)))
    assert figures["tokens"] == 50
    for name in ("keys", "values"):
        assert figures[name]["dimensions"] == 6
        assert figures[name]["layers"] == pytest.approx([rank], rel=1e-4)


def test_closed_gates_change_no_rank():
    tiny = Study.tiny()
    pair = CacheToCache(
        tiny.pair.receiver, tiny.pair.sharers, [tiny_fuser(tiny.pair.receiver, tiny.pair.sharers[0], gate_init=-1.0)]
    )
    found = run(Study(pair, tiny.questions)).figures["caches"]
    assert found["fused"] == found["receiver"]
    assert found["sharer"]["tokens"] > 0


def test_the_rank_is_computed_from_singular_values():
    study = Study.tiny()
    found = run(study).figures["caches"]
    rows = {}
    with torch.no_grad():
        for question in study.questions:
            for name, (kv, _) in caches(read(study.pair, [question])).items():
                rows.setdefault(name, []).append(kv.key[0, 0].transpose(0, 1).flatten(1))
    for name, tokens in rows.items():
        expected = float(effective_rank(torch.linalg.svdvals(torch.cat(tokens).double())))
        assert found[name]["keys"]["layers"][0] == pytest.approx(expected, rel=1e-3)
