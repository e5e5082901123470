import pytest
import torch

from kvfuse.analysis.hooks import observe


def test_observers_are_called_and_come_off_even_after_an_error():
    one, other, seen = torch.nn.Linear(2, 3), torch.nn.ReLU(), []
    x = torch.ones(1, 2)

    def fail():
        with observe({one: lambda i, o: seen.append((i, o)), other: lambda i, o: seen.append(o)}):
            y = one(x)
            other(y)
            raise KeyError(y)

    with pytest.raises(KeyError) as stopped:
        fail()
    (y,) = stopped.value.args
    assert seen[0][0][0] is x
    assert seen[0][1] is y
    assert torch.equal(seen[1], y.relu())
    one(x)
    assert len(seen) == 2
    assert not one._forward_hooks
    assert not other._forward_hooks
