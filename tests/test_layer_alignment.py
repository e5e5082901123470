import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfuse.errors import PairError
from kvfuse.fusers import layer_alignment
from kvfuse.fusers.layer_alignment import LAYER_ALIGNMENTS, align_layers

depths = st.integers(1, 80)


def test_examples_in_the_docstring():
    assert doctest.testmod(layer_alignment).failed == 0


@given(receiver=depths, sharer=depths, how=st.sampled_from(LAYER_ALIGNMENTS))
def test_layers_are_monotone_and_last_meets_last(receiver, sharer, how):
    layers = align_layers(receiver, sharer, how)
    assert layers == sorted(layers)
    assert len(layers) == receiver
    assert set(layers) <= set(range(sharer))
    assert layers[-1] == sharer - 1 or receiver == 1


@given(depth=depths, how=st.sampled_from(LAYER_ALIGNMENTS))
def test_equal_depths_pair_one_to_one(depth, how):
    assert align_layers(depth, depth, how) == list(range(depth))


@pytest.mark.parametrize("how", ["trminal", [0, 1], [0, 1, 9]])
def test_an_alignment_that_does_not_fit_is_refused(how):
    with pytest.raises(PairError, match="expected"):
        align_layers(3, 4, how)
