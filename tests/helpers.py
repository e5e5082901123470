"""Helpers of several test modules: random caches, comparisons of caches, the operations that a computation runs."""

from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.fusers.base import Fuser
from kvfuse.testing import FAMILIES


def random_kv(spec: KVSpec, batch: int = 2, tokens: int = 5) -> KV:
    """A cache of random keys and values with the spec's layers, heads and dimensions."""
    shape = (spec.num_layers, batch, spec.num_kv_heads, tokens)
    return KV(torch.randn(*shape, spec.key_dim), torch.randn(*shape, spec.value_dim))


def inputs_of(fuser: Fuser, *, batch: int = 2, tokens: int = 5, seed: int = 1) -> tuple[KV, KV]:
    """Random caches of the receiver and the sharer, the same ones for the same seed."""
    torch.manual_seed(seed)
    return tuple(random_kv(spec, batch, tokens) for spec in (fuser.config.receiver_kv, fuser.config.sharer_kv))


def assert_kv_close(got: KV, expected: KV, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Asserts that keys and values are equal up to rounding."""
    torch.testing.assert_close(got.key, expected.key, rtol=rtol, atol=atol)
    torch.testing.assert_close(got.value, expected.value, rtol=rtol, atol=atol)


def assert_kv_equal(got: KV, expected: KV) -> None:
    """Asserts that keys and values are equal bit by bit."""
    assert_kv_close(got, expected, rtol=0, atol=0)


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that both have the same names and, bit by bit, the same tensors."""
    torch.testing.assert_close(dict(got), dict(expected), rtol=0, atol=0)


def assert_gradients_reach_everything(fuser: Fuser, inputs: tuple[KV, KV]) -> None:
    """Asserts that no parameter is without a gradient after one backward pass."""
    residual = fuser.train()(receiver=inputs[0], sharer=inputs[1])
    (residual.key.square().sum() + residual.value.square().sum()).backward()
    unreached = [name for name, weight in fuser.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert unreached == []


def chat_of(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """A chat of pairs of a role and a content."""
    return [{"role": role, "content": content} for role, content in turns]


class Dispatched(TorchDispatchMode):
    """Records the names of the operations that compute something; views are left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "view" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class CheckedHTML(HTMLParser):
    """Parses a page; fails where a tag is not closed or closes another."""

    VOID = frozenset({"meta", "br", "img", "link"})  # elements without an end tag

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


CORE_FAMILIES = ("qwen3", "gemma2", "gpt2", "mpt", "qwen3_next")
"""A plain one, sliding windows, learned positions, ALiBi, linear attention: the others are asked in the long run."""


def families(*left_out: str) -> list[Any]:
    """Parameters of a test for each family, those beside :data:`CORE_FAMILIES` marked slow."""
    return [
        pytest.param(family, marks=() if family in CORE_FAMILIES else pytest.mark.slow)
        for family in FAMILIES
        if family not in left_out
    ]
