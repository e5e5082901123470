"""Controls, which measure what the sharer's cache contributes: each is Cache-to-Cache with one ingredient removed."""

import copy
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from kvfuse.cache.kv import KV
from kvfuse.errors import MethodError
from kvfuse.fusers import Fuser
from kvfuse.methods.cache_to_cache import Fused
from kvfuse.methods.donors import choose_donors
from kvfuse.model import CacheToCache
from kvfuse.prompts.alignment import AlignedRow
from kvfuse.prompts.messages import Prompt

FIRST_DRAW = 2**20  # seeds of random fusers start here, so that none is the seed of a trained fuser's first weights


class Zeroed(Fused):
    """The fusers read zeros in place of every sharer's cache."""

    name = "zeroed"

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The pair's fusers behind a layer that zeroes the sharer's cache."""
        return [_ZeroedSharer(fuser) for fuser in self.pair.fusers]


class Mismatched(Fused):
    """The sharers read another prompt than the receiver.

    Args:
        pair: The models.
        donor: Returns the prompt that the sharers read in place of a given one; by default the prompt of the run that
            follows it by length (:meth:`prepare`).
    """

    name = "mismatched"

    def __init__(self, pair: CacheToCache, donor: Callable[[Prompt], Prompt] | None = None) -> None:
        super().__init__(pair)
        self.donor = donor or self._prepared_donor
        self._donors: dict[str, Prompt] = {}

    def prepare(self, prompts: Sequence[Prompt], **options: Any) -> None:
        """Choose the donors: the next prompt by length, in random order among prompts of one length.

        Donors of similar length are mostly questions of the same kind, so that the damage done by a sharer that read
        another kind of question does not count as content. Neighbours in the run would often share their topic.
        """
        # a question that occurs twice must not be its own donor
        unique = {_key(prompt): prompt for prompt in prompts}
        keys = sorted(unique)
        donors = zip(keys, self.choose(keys), strict=True)
        self._donors = {key: unique[keys[donor]] for key, donor in donors if donor is not None}

    def choose(self, keys: Sequence[str]) -> list[int | None]:
        """The donor of each prompt, as :func:`kvfuse.methods.donors.choose_donors` gives it."""
        return choose_donors(keys, key=len)

    def align(self, prompt: Prompt) -> AlignedRow:
        """Returns the prompt for the receiver and its donor for the sharers."""
        return swap_sharers(self.pair.align(prompt), donor=self.pair.align(self.donor(prompt)))

    def _prepared_donor(self, prompt: Prompt) -> Prompt:
        if _key(prompt) not in self._donors:
            raise MethodError(
                "expected a prompt of a run with others to read instead, got one without; call prepare with two or more"
            )
        return self._donors[_key(prompt)]


class Shuffled(Fused):
    """Each receiver position reads another position of the sharer's prompt than its own.

    Args:
        pair: The models.
        seed: Of the order, which otherwise depends on the prompt alone.
    """

    name = "shuffled"

    def __init__(self, pair: CacheToCache, seed: int = 0) -> None:
        super().__init__(pair)
        self.seed = seed

    def align(self, prompt: Prompt) -> AlignedRow:
        """Returns the prompt with the sharers' positions interchanged."""
        aligned = self.pair.align(prompt)
        # the same prompt is shuffled in the same way in every run
        rng = np.random.default_rng([self.seed, zlib.crc32(aligned.receiver.ids.tobytes())])
        shuffled = [(sharer, _interchange(index, len(sharer.ids), rng)) for sharer, index in aligned.sharers]
        return replace(aligned, sharers=tuple(shuffled))


class RandomFuser(Fused):
    """Fusers of the same configuration with freshly drawn weights and the trained gates.

    Args:
        pair: The models.
        seed: Of the weights.
    """

    name = "random-fuser"

    def __init__(self, pair: CacheToCache, seed: int = 0) -> None:
        super().__init__(pair)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(FIRST_DRAW + seed)
            self._random_fusers = [_randomize(fuser) for fuser in pair.fusers]

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The random fusers."""
        return self._random_fusers


class ProjectedOnly(Fused):
    """The fusers' output replaces the receiver's cache (paper, table 8, without retraining)."""

    name = "projected-only"

    @property
    def fusers(self) -> Sequence[nn.Module]:
        """The pair's fusers; the first also subtracts the receiver's cache, to which the residuals are added."""
        first, *others = self.pair.fusers
        return [_WithoutReceiver(first), *others]


def swap_sharers(prompt: AlignedRow, *, donor: AlignedRow) -> AlignedRow:
    """Returns ``prompt`` as the receiver reads it and ``donor`` as the sharers read it.

    The two are aligned from their ends, where the answer begins:

    ```
    receiver of the prompt    A B C D E
    receiver of the donor         x y z     A, B and C read what x read
    ```
    """
    shift = len(donor.receiver.ids) - len(prompt.receiver.ids)
    positions = np.maximum(np.arange(len(prompt.receiver.ids)) + shift, 0)  # (T,) of the donor
    return replace(prompt, sharers=tuple((sharer, index[positions]) for sharer, index in donor.sharers))


class _Wrapper(nn.Module):
    def __init__(self, fuser: Fuser) -> None:
        super().__init__()
        self.fuser = fuser


class _ZeroedSharer(_Wrapper):
    def forward(self, receiver: KV, sharer: KV) -> KV:
        return self.fuser(receiver=receiver, sharer=sharer.zeros_like())


class _WithoutReceiver(_Wrapper):
    def forward(self, receiver: KV, sharer: KV) -> KV:
        # the caller adds the receiver's cache, which cancels the subtraction
        residual = self.fuser(receiver=receiver, sharer=sharer)
        return KV(residual.key - receiver.key, residual.value - receiver.value)


def _interchange(index: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns ``index`` with the ``length`` positions that it points to moved one step along a random cycle.

    A single cycle has no fixed points: no position is replaced by itself. -1 (reads nothing) stays.
    """
    cycle = rng.permutation(length)
    successor = np.empty(length, dtype=np.int64)
    successor[cycle] = np.roll(cycle, 1)
    return np.where(index >= 0, successor[index], -1)


def _randomize(fuser: Fuser) -> Fuser:
    config = copy.deepcopy(fuser.config)
    if hasattr(config, "zero_init"):  # with a residual of zero there would be no fuser at all
        config.zero_init = False
    random_fuser = type(fuser)(config)
    random_fuser.reset_parameters()
    random_fuser.to(fuser.device, fuser.dtype).eval()
    # which heads are open is not part of what is random
    for gate, trained in zip(random_fuser.gate_parameters(), fuser.gate_parameters(), strict=True):
        gate.data.copy_(trained.data)
    return random_fuser


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
