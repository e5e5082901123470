import pytest
import torch

from kvfuse.analysis.gates import draw, run
from kvfuse.analysis.readout import read
from kvfuse.analysis.study import Study
from kvfuse.errors import AnalysisError
from kvfuse.fusers.groups import to_groups
from kvfuse.fusers.layers import HeadWeights
from kvfuse.model import CacheToCache
from kvfuse.testing import tiny_fuser


def study_of(tiny, **options):
    pair = tiny.pair
    return Study(
        CacheToCache(pair.receiver, pair.sharers, [tiny_fuser(pair.receiver, pair.sharers[0], **options)]),
        tiny.questions,
    )


@pytest.fixture(scope="module")
def tiny():
    return Study.tiny()


def test_weights_are_those_of_all_fused_tokens(tiny):
    """Against the parts of the fuser, prompt by prompt."""
    study = study_of(tiny)
    (fuser,), found = study.pair.fusers, run(study).figures["sharers"][0]
    weights = []
    with torch.no_grad():
        for question in study.questions:
            batch = read(study.pair, [question])
            rows, tokens = batch.fused_positions.nonzero(as_tuple=True)
            sources = batch.prompt.sharers[0].index[rows, tokens]
            picked = batch.clean.tokens(rows, tokens), batch.sharers[0].tokens(rows, sources)
            both = torch.cat([to_groups(picked[1], layers=fuser.sharer_layers), to_groups(picked[0])], -1)
            hidden = fuser.fusion(fuser.fusion_in(both))
            weights.append(torch.sigmoid(fuser.weighting_out(fuser.weighting(hidden))))
            assert to_groups(picked[0]).shape[1] == weights[-1].shape[1]
    weights = torch.cat(weights, 1)
    assert found["tokens"] == weights.shape[1]
    both = torch.tensor([found[name]["weight"] for name in ("keys", "values")]).flatten(0, 1)
    torch.testing.assert_close(both, weights.mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["c2c", "low-rank", "c2c-complex"])
def test_every_kind_that_weights_its_heads_is_read(tiny, kind):
    study = study_of(tiny, kind=kind)
    for name, parameter in study.pair.fusers[0].named_parameters():
        if name.startswith("weighting_out" if kind != "low-rank" else "weighting"):
            torch.nn.init.zeros_(parameter)
    found = run(study).figures["sharers"][0]
    for part in ("keys", "values"):
        torch.testing.assert_close(torch.tensor(found[part]["weight"]), torch.full((3, 2), 0.5))
        assert min(map(min, found[part]["relative_size"])) > 0


def test_closed_gates_add_nothing_and_are_crossed_out(tiny):
    study = study_of(tiny, gate="head")
    with torch.no_grad():
        study.pair.fusers[0].gate.logit[1, 0, 1] = -1.0  # keys of layer 1, head 1
    finding = run(study)
    keys, values = (finding.figures["sharers"][0][part] for part in ("keys", "values"))
    assert keys["open"] == [[True, True], [True, False], [True, True]]
    assert keys["relative_size"][1][1] == 0 < keys["relative_size"][1][0]
    assert all(map(all, values["open"]))
    crossed = [line.get_xydata().tolist() for line in finding.draw().axes[0].lines]
    assert crossed == [[[1, 1]], [[1, 1]]]  # twice, for an outline


@pytest.mark.parametrize("options", [{"gate": "none", "weighting": False}, {"parts": "values"}])
def test_missing_weights_and_gates_are_none(tiny, options):
    study = study_of(tiny, **options)
    found = run(study).figures
    keys, values = (found["sharers"][0][part] for part in ("keys", "values"))
    assert (keys["weight"], keys["open"]) == (None, None)
    assert (values["weight"] is None) == (not options.get("parts"))
    rows = 1 + (values["weight"] is not None)  # of maps: sizes, and weights where there are any
    assert len(draw(found).axes) == 3 * rows, "keys, values and a colour bar"


def test_nothing_is_left_behind(tiny):
    study = study_of(tiny)
    run(study)
    assert not any(module._forward_hooks for module in study.pair.fusers[0].modules())
    assert sum(isinstance(module, HeadWeights) for module in study.pair.fusers[0].modules()) == 1


def test_questions_of_which_nothing_is_fused_are_refused(tiny):
    with pytest.raises(AnalysisError, match="something is fused"):
        run(Study(tiny.pair, []))
