"""Prompts read through CUDA graphs: what a model queues on a GPU for so many tokens is recorded once, then queued by one call.

A short prompt takes a GPU as long as Python needs to queue some hundred kernels, not as long as they run. A graph is for one shape;
but what comes behind a token changes nothing before it, so a prompt is filled up to the next of a few lengths, with any tokens, and
what the model makes of those is not read.
"""

from collections import OrderedDict
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache, PreTrainedModel

from kvfuse.cache.transformers_cache import KV, copy_stacked, read_cache
from kvfuse.errors import PairError, first_line
from kvfuse.stages.prefill import prefill, supports_prefix_reuse

SHORTEST, STEPS = 64, 4  # tokens; lengths an octave
MOST = 4096  # tokens of a batch; longer ones keep a GPU busy for longer than they take to queue
KEPT = 20  # graphs of a model, each with a cache of its length


class CudaGraphPrefill:
    """:func:`kvfuse.stages.prefill.prefill`, recorded where there is no padding and nothing to go on from; all else is read as ever.

    Threads may share one. A model's weights may change in place, but must stay where they are.
    """

    def __init__(self) -> None:
        self._recorded = WeakIdKeyDictionary()
        self._lock = Lock()

    def __call__(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> Cache:
        """Arguments and result as those of :func:`kvfuse.stages.prefill.prefill`. Raises PairError: The model's run cannot be recorded."""
        if cache is not None or ids.numel() > MOST or not bool(mask.all()):
            return prefill(model, ids, mask, positions, cache)
        with self._lock:
            graphs = self._graphs(model)
            if graphs is None:
                return prefill(model, ids, mask, positions)
            shape = len(ids), graph_length(ids.shape[1])
            if shape not in graphs:
                graphs[shape] = _Recording(model, *shape)
            graphs.move_to_end(shape)
            if len(graphs) > KEPT:
                graphs.popitem(last=False)
            return graphs[shape].read(ids, positions)

    def _graphs(self, model: PreTrainedModel) -> "OrderedDict[tuple[int, int], _Recording] | None":
        """Those of a model, by batch and length; None: it lies on no GPU or on several, or a longer prompt's cache begins otherwise."""
        if model not in self._recorded:
            devices = {parameter.device for parameter in model.parameters()}
            alone = len(devices) == 1 and model.device.type == "cuda"
            self._recorded[model] = OrderedDict() if alone and supports_prefix_reuse(model) else None
        return self._recorded[model]


class _Recording:
    """A model's run over ``(B, T)`` tokens; its cache is overwritten by the next run."""

    @torch.inference_mode(False)  # what is made under it could not be written to elsewhere
    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batch: int, length: int) -> None:
        self.config = model.config
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=model.device)
        self.positions = torch.arange(length, device=model.device).repeat(batch, 1)
        run = model, self.ids, torch.ones(batch, length, dtype=torch.long), self.positions
        prefill(*run)  # kernels are chosen, and workspaces made, outside of the graph
        self.graph, self.copied = torch.cuda.CUDAGraph(), torch.cuda.Event()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.kv = read_cache(prefill(*run))
        except RuntimeError as error:
            raise PairError(
                f"expected a model whose run on a GPU can be recorded, got {type(model).__name__}: {first_line(error)}; leave capture out"
            ) from error

    def read(self, ids: Tensor, positions: Tensor) -> Cache:
        """A cache of ``(B, t)`` tokens, not more than were recorded, which is the caller's own."""
        length = ids.shape[1]
        torch.cuda.current_stream(self.ids.device).wait_event(
            self.copied
        )  # another stream may still read the last cache
        self.ids[:, :length].copy_(ids)
        self.positions[:, :length].copy_(positions)
        self.graph.replay()
        cache = copy_stacked(self.config, KV(self.kv.key[..., :length, :], self.kv.value[..., :length, :]))
        self.copied.record(torch.cuda.current_stream(self.ids.device))
        return cache


def graph_length(tokens: int) -> int:
    """The next of the lengths that are recorded: 64, and four an octave from 256 on."""
    step = max(SHORTEST, (1 << (tokens - 1).bit_length()) // (2 * STEPS))
    return -(-tokens // step) * step
