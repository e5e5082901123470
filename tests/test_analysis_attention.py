"""Attention of the first answer token."""

import pytest
import torch

from kvfuse.analysis.attention import WAYS, attention_weights, run
from kvfuse.analysis.readout import ROLES, eager_attention, read
from kvfuse.analysis.study import Study


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_next"])
def test_attention_sums_to_one(family):
    study = Study.tiny(family)
    figures = run(study).figures
    for layer in figures["layers"]:
        for way in WAYS:
            assert sum(layer[way][role] for role in ROLES) == pytest.approx(1, abs=1e-4)
    assert len(figures["example"]["tokens"]) == len(figures["example"]["alone"][0])


def test_padding_is_not_attended_to():
    study = Study.tiny()
    with torch.no_grad(), eager_attention(study.pair.receiver.model):
        batch = read(study.pair, study.questions)
        weights = attention_weights(batch, batch.fused)
    assert (batch.prompt.mask == 0).any()
    assert float(weights[:, batch.prompt.mask == 0].abs().max()) < 1e-6


def test_nothing_moves_where_nothing_is_fused():
    study = Study.tiny()
    for fuser in study.pair.fusers:
        fuser.gate.logit.data.fill_(-1)
    moved = [layer["moved"] for layer in run(study).figures["layers"]]
    assert moved == [0] * study.pair.receiver.kv_spec.num_layers
