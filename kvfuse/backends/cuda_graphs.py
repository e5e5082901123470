"""Prefill through CUDA graphs: kernel launches are captured once per length and replayed.

For a short prompt a GPU waits for Python to launch some hundred kernels. A graph is for one shape, so a prompt is
padded on the right, with any tokens, to the next of a few lengths: what follows a token changes nothing before it.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import Cache, PreTrainedModel

from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import copy_stacked, read_cache, supports_prefix_reuse
from kvfuse.errors import PairError, first_line

MIN_GRAPH_TOKENS, GRAPHS_PER_OCTAVE = 64, 4
MAX_GRAPH_TOKENS = 4096  # of a batch; longer ones take longer to run than to launch
MAX_GRAPHS = 20  # of a model, each with a cache of its length


class CudaGraphPrefill:
    """Reads batches without padding, from the start, through graphs; everything else by the prefill that it wraps.

    Threads may share one. The weights of a model may change in place, but must not move.

    Args:
        prefill: Runs a model (:func:`kvfuse.stages.prefill.prefill`).
    """

    def __init__(self, prefill: Callable[..., Cache]) -> None:
        self.prefill = prefill
        self._graphs = WeakIdKeyDictionary()
        self._lock = Lock()

    def __call__(
        self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> Cache:
        """As the wrapped prefill. Raises PairError if the model's run cannot be captured."""
        if cache is not None or ids.numel() > MAX_GRAPH_TOKENS or not bool(mask.all()):
            return self.prefill(model, ids, mask, positions, cache)
        with self._lock:
            graphs = self._graphs_of(model)
            if graphs is None:
                return self.prefill(model, ids, mask, positions)
            shape = len(ids), graph_length(ids.shape[1])
            if shape not in graphs:
                graphs[shape] = _Graph(self.prefill, model, *shape)
            graphs.move_to_end(shape)
            if len(graphs) > MAX_GRAPHS:
                graphs.popitem(last=False)
            return graphs[shape].replay(ids, positions)

    def _graphs_of(self, model: PreTrainedModel) -> "OrderedDict[tuple[int, int], _Graph] | None":
        """The graphs of a model by batch size and length; None if it is not on one GPU, or has no prefix reuse."""
        if model not in self._graphs:
            devices = {parameter.device for parameter in model.parameters()}
            on_one_gpu = len(devices) == 1 and model.device.type == "cuda"
            self._graphs[model] = OrderedDict() if on_one_gpu and supports_prefix_reuse(model) else None
        return self._graphs[model]


class _Graph:
    """A model's run over ``(B, T)`` tokens; its cache is overwritten by the next run."""

    @torch.inference_mode(False)  # tensors made under it could not be written to outside of it
    @torch.no_grad()
    def __init__(self, prefill: Callable[..., Cache], model: PreTrainedModel, batch: int, length: int) -> None:
        self.config = model.config
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=model.device)
        self.positions = torch.arange(length, device=model.device).repeat(batch, 1)
        run = model, self.ids, torch.ones(batch, length, dtype=torch.long), self.positions
        # 1) Kernels are chosen and workspaces made outside of the graph.
        prefill(*run)
        # 2) Capture.
        self.graph, self.copied = torch.cuda.CUDAGraph(), torch.cuda.Event()
        try:
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.kv = read_cache(prefill(*run))
        except RuntimeError as error:
            raise PairError(
                "expected a model whose run on a GPU can be recorded, "
                f"got {type(model).__name__}: {first_line(error)}; leave CUDA graphs out"
            ) from error

    def replay(self, ids: Tensor, positions: Tensor) -> Cache:
        """A cache of ``(B, t)`` tokens, at most as many as were captured, that belongs to the caller."""
        length = ids.shape[1]
        stream = torch.cuda.current_stream(self.ids.device)
        stream.wait_event(self.copied)  # another stream may still copy the last result
        self.ids[:, :length].copy_(ids)
        self.positions[:, :length].copy_(positions)
        self.graph.replay()
        cache = copy_stacked(self.config, KV(self.kv.key[..., :length, :], self.kv.value[..., :length, :]))
        self.copied.record(stream)
        return cache


def graph_length(tokens: int) -> int:
    """The next of the captured lengths: 64, and four an octave from 256 on."""
    step = max(MIN_GRAPH_TOKENS, (1 << (tokens - 1).bit_length()) // (2 * GRAPHS_PER_OCTAVE))
    return -(-tokens // step) * step
