import pytest
import torch

from kvfuse.analysis.hooks import watching


def test_hooks_are_told_and_come_off_even_after_an_error():
    one, other, told = torch.nn.Linear(2, 3), torch.nn.ReLU(), []
    x = torch.ones(1, 2)

    def fail():
        with watching({one: lambda i, o: told.append((i, o)), other: lambda i, o: told.append(o)}):
            y = one(x)
            other(y)
            raise KeyError(y)

    with pytest.raises(KeyError) as stopped:
        fail()
    (y,) = stopped.value.args
    assert told[0][0][0] is x
    assert told[0][1] is y
    assert torch.equal(told[1], y.relu())
    one(x)
    assert len(told) == 2
    assert not one._forward_hooks
    assert not other._forward_hooks
