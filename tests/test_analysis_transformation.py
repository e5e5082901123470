"""Maps between caches: known answers, and that a perfect map changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvfuse.analysis import transformation
from kvfuse.analysis.maps import Standardizer, coverage, mean, perceptrons, ridge
from kvfuse.analysis.study import Study
from kvfuse.analysis.transformation import LayerTokens, flat, predictors, run
from kvfuse.errors import AnalysisError


def linear(tokens=400):
    torch.manual_seed(0)
    x = torch.randn(tokens, 6)
    return x, x @ torch.randn(6, 4) + 3


def test_ridge_finds_a_linear_map():
    x, y = linear()
    assert (ridge(source=x, target=y)(x) - y).abs().max() < 0.2
    assert torch.equal(mean(y)(x)[0], y.mean(0))


def test_the_perceptron_learns_by_stages():
    x, y = linear()
    maps = perceptrons(source=x, target=y, hidden=32, stages=(0, 50, 400), seed=0)
    errors = [float((one(x) - y).square().mean()) for one in maps]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05 * errors[0]


def test_the_perceptron_is_the_same_for_the_same_seed():
    x, y = linear(50)
    options = {"source": x, "target": y, "hidden": 8, "stages": (0, 5), "seed": 3}
    first, again = (perceptrons(**options)[-1](x) for _ in range(2))
    assert torch.equal(first, again)


def test_standardizing_is_undone():
    x, _ = linear()
    standardize = Standardizer(x)
    torch.testing.assert_close(standardize.invert(standardize(x)), x)


def test_coverage_of_known_clouds():
    cloud = np.random.default_rng(0).normal(size=(200, 3))
    assert coverage(target=cloud, points=cloud) == {"inside": 1.0, "reached": 1.0}
    assert coverage(target=cloud, points=cloud + 100) == {"inside": 0.0, "reached": 0.0}
    few = coverage(target=cloud, points=cloud[:1].repeat(200, 0))
    assert few["inside"] == 1.0
    assert few["reached"] < 0.2


def test_a_perfect_map_changes_nothing():
    study = Study.tiny()
    tokens = LayerTokens(study, 1)
    ((batch, kv),) = tokens.replaced(lambda _: tokens.receiver)
    torch.testing.assert_close(kv.key, batch.clean.key)
    quality = transformation._effect(lambda _: tokens.receiver, tokens)
    assert quality["attention_cosine"] == pytest.approx(1)
    assert quality["divergence"] == pytest.approx(0, abs=1e-5)


def test_a_map_stands_in_one_layer_alone_at_the_aligned_tokens():
    study = Study.tiny()
    tokens = LayerTokens(replace(study, questions=study.questions[:1]), 1)
    ((batch, kv),) = tokens.replaced(lambda x: torch.full((len(x), tokens.receiver.shape[1]), 7.0))
    reached = batch.fused_positions[0]
    torch.testing.assert_close(kv.value[1, 0, :, reached], torch.full_like(kv.value[1, 0, :, reached], 7.0))
    torch.testing.assert_close(kv.value[[0, 2]], batch.clean.value[[0, 2]])
    assert not torch.allclose(batch.first_logits(kv), batch.first_logits(batch.clean))
    assert flat(tokens.batches[0][1].receiver, 1).shape == tokens.receiver.shape


def test_predictors_are_rank_correlations():
    rows = [{"attention_cosine": 1 - place, "validation_mse": place**3, "divergence": place} for place in range(4)]
    assert predictors(rows) == {"attention_cosine": pytest.approx(-1), "validation_mse": pytest.approx(1)}


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_runs(family):
    figures = run(Study.tiny(family), samples=20).figures
    assert set(figures["clouds"]) == {"PCA", "t-SNE"}
    assert {len(points) for clouds in figures["clouds"].values() for points in clouds.values()} == {
        min(20, figures["tokens"]["validation"])
    }


def test_there_must_be_such_a_layer():
    with pytest.raises(AnalysisError, match="from -3 to 2"):
        run(Study.tiny(), layer=3)
