"""Two models, or more, that answer together: align, prefill, fuse, decode, in that order."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvfuse.backends.cuda_graphs import CudaGraphPrefill
from kvfuse.backends.offloading import input_device
from kvfuse.backends.streams import fork
from kvfuse.cache.kv import KV
from kvfuse.cache.transformers_cache import has_state, read_cache, read_only_cache, write_cache
from kvfuse.checkpoint import load_fuser
from kvfuse.errors import PairError, PromptError
from kvfuse.fusers import Fuser
from kvfuse.fusers.execution.fold_norms import fold_norms
from kvfuse.language_model import LanguageModel, check_identity
from kvfuse.prompts.alignment import Aligned, AlignedPrompt, AlignedRow, align, as_prompt, count_positions, stack
from kvfuse.prompts.messages import Prompt, Prompts, as_batch, as_chat, is_single
from kvfuse.prompts.response_tokens import response_tokens
from kvfuse.stages.decode import decode, stream
from kvfuse.stages.fuse import FUSIONS, SelectedTokens, fuse, select_tokens
from kvfuse.stages.generate_options import require_options, static_length, token_options
from kvfuse.stages.phases import phase
from kvfuse.stages.prefill import ModelCaches, Prefill, prefill
from kvfuse.stages.prefix_store import PrefixStore
from kvfuse.stages.response_fusion import FusedPrompt, ResponseFuser, TailKV
from kvfuse.support.hub import DOWNLOAD_OPTIONS, select


class CacheToCache:
    """A receiver that answers from its own KV-cache and the caches of one or more sharers.

    Args:
        receiver: The model that answers.
        sharers: The models that only read.
        fusers: One per sharer, trained for exactly this pair.
        fusion: How several sharers come together, ``parallel`` or ``sequential`` (:func:`kvfuse.stages.fuse.fuse`).
        store: Keeps the caches of prompts for later prompts with the same prefix; by default none are kept.

    Raises:
        PairError: A fuser belongs to another pair, or a model cannot go on from a filled cache.
    """

    def __init__(
        self,
        receiver: LanguageModel,
        sharers: Sequence[LanguageModel],
        fusers: Sequence[Fuser],
        fusion: str = "parallel",
        store: PrefixStore | None = None,
    ) -> None:
        if fusion not in FUSIONS:
            raise PairError(f"expected fusion to be one of {', '.join(FUSIONS)}, got {fusion!r}; choose one")
        if len(sharers) != len(fusers) or not sharers:
            raise PairError(
                f"expected one fuser per sharer, got {len(fusers)} for {len(sharers)}; name as many of each"
            )
        for sharer, fuser in zip(sharers, fusers, strict=True):
            _require_fit(receiver=receiver, sharer=sharer, fuser=fuser)
        if len({(fuser.config.fuse, fuser.config.fuse_response) for fuser in fusers}) > 1:
            raise PairError(
                "expected fusers that fuse the same positions, got fusers for different ones; train them alike"
            )
        self.receiver, self.sharers, self.fusers = receiver, list(sharers), list(fusers)
        self.fusion, self.store = fusion, store
        self.prefiller: Prefill = prefill
        removed = [fuser.config.rope == "removed" for fuser in fusers]
        self.ropes = [
            (receiver.rope, sharer.rope) if off else None for sharer, off in zip(sharers, removed, strict=True)
        ]

    @classmethod
    def from_pretrained(
        cls,
        receiver: str | Path | None = None,
        sharer: str | Path | Sequence[str | Path] | None = None,
        fuser: str | Path | Sequence[str | Path] = (),
        subfolder: str | Sequence[str] = "",
        fusion: str = "parallel",
        receiver_options: dict[str, Any] | None = None,
        sharer_options: dict[str, Any] | None = None,
        store: PrefixStore | None = None,
        **model_options: Any,
    ) -> Self:
        """Load models and fusers from local folders or the Hub.

        Args:
            receiver: Folder or Hub id; by default the one that the first fuser names.
            sharer: One or more; by default those that the fusers name.
            fuser: One per sharer, in the same order; in our format or the authors'.
            subfolder: Folder of the fuser inside of ``fuser``, or one for each.
            fusion: See :class:`CacheToCache`.
            receiver_options: For the receiver in place of ``model_options``, name by name, e.g. its ``subfolder``.
            sharer_options: The same for the sharers, e.g. ``{"device_map": "cuda:1"}``.
            store: See :class:`CacheToCache`.
            model_options: For all models, e.g. ``dtype``, ``device_map``, ``quantization_config``; ``token``,
                ``cache_dir`` and the like hold for the fusers' repositories too.

        Raises:
            PairError: Models and fusers that do not fit, or a model that is not there.
            CheckpointError: A fuser that is missing or damaged.
        """
        # 1) Fusers: they name the models that they were trained with.
        sources = _as_list(fuser)
        subfolders = [subfolder] * len(sources) if isinstance(subfolder, str) else subfolder
        download = select(model_options, DOWNLOAD_OPTIONS)
        fusers = [load_fuser(source, inside, **download) for source, inside in zip(sources, subfolders, strict=True)]
        if not fusers:
            raise PairError("expected at least one fuser, got none; name a fuser's folder or Hub id")
        # 2) Models.
        sharers = _as_list(sharer) if sharer is not None else [fuser.config.sharer["name"] for fuser in fusers]
        receiver_options, sharer_options = (
            {**model_options, **(options or {})} for options in (receiver_options, sharer_options)
        )
        loaded = LanguageModel.from_pretrained(receiver or fusers[0].config.receiver["name"], **receiver_options)
        others = [LanguageModel.from_pretrained(name, **sharer_options) for name in sharers]
        # 3) A fuser is never computed in less precision than it was trained in, nor than the receiver.
        for one in fusers:
            one.to(input_device(loaded.model), torch.promote_types(one.dtype, loaded.model.dtype))
        return cls(loaded, others, fusers, fusion, store)

    @property
    def fuse_response(self) -> bool:
        """Whether the last prompt token and the response are fused as well, as the fusers were trained to."""
        return self.fusers[0].config.fuse_response

    @property
    def device(self) -> torch.device:
        """Of the receiver."""
        return input_device(self.receiver.model)

    @property
    def dtype(self) -> torch.dtype:
        """Of the receiver."""
        return self.receiver.model.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all models and fusers, in place; arguments as those of ``torch.nn.Module.to``."""
        for module in (self.receiver.model, *(sharer.model for sharer in self.sharers), *self.fusers):
            module.to(*args, **kwargs)
        return self

    def fold_norms(self) -> Self:
        """Multiply the weights of the fusers' norms into the linear layers behind them, in place: fewer kernels.

        Results are equal up to rounding. A folded fuser can neither be trained nor saved.
        """
        for fuser in self.fusers:
            fold_norms(fuser.eval().requires_grad_(False))
        return self

    def use_cuda_graphs(self) -> Self:
        """Read prompts without padding through CUDA graphs (:mod:`kvfuse.backends.cuda_graphs`); no change on a CPU.

        A length is captured when it is first read, which takes a few reads' time and keeps a cache of its size. The
        models must stay on their devices.
        """
        self.prefiller = CudaGraphPrefill(prefill)
        return self

    def select(self, *sharers: int) -> Self:
        """The same models with some of the sharers only, named by index; for one request, at no cost."""
        if not sharers or not all(0 <= index < len(self.sharers) for index in sharers):
            last = len(self.sharers) - 1
            raise PairError(f"expected indices of sharers from 0 to {last}, got {sharers}; choose at least one of them")
        chosen = [self.sharers[i] for i in sharers], [self.fusers[i] for i in sharers]
        pair = type(self)(self.receiver, *chosen, self.fusion, self.store)
        pair.prefiller = self.prefiller
        return pair

    @torch.no_grad()
    def generate(self, prompts: Prompts, **options: Any) -> Any:
        """Continue one prompt or a batch with transformers' ``generate``.

        Args:
            prompts: Texts and chats; one is a batch of one.
            options: Any of ``generate``: ``max_new_tokens``, sampling, beams, ``streamer``, …

        Returns:
            ``(B, T + new)`` int64 ids of the receiver, or what ``return_dict_in_generate`` asks for.

        Raises:
            PromptError: A prompt is empty, or longer than a model's context.
        """
        return self.answer(stack([self.align(prompt) for prompt in as_batch(prompts)]), **options)

    @overload
    def chat(self, messages: Prompt, **options: Any) -> str: ...

    @overload
    def chat(self, messages: Sequence[Prompt], **options: Any) -> list[str]: ...

    @torch.no_grad()
    def chat(self, messages: Prompts, **options: Any) -> str | list[str]:
        """Answer one chat or question, as text, or several, as a list. ``options`` are those of :meth:`generate`."""
        prompt = stack([self.align(as_chat(chat)) for chat in as_batch(messages)])
        ids = self.answer(prompt, **options)[:, prompt.ids.shape[1] :]
        texts: list[str] = self.receiver.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts[0] if is_single(messages) else texts

    def stream(self, messages: Prompt, *, cancel: Event | None = None, **options: Any) -> Iterator[str]:
        """Answer one chat piece by piece, as it is generated.

        Leaving the loop, or closing the iterator (``contextlib.closing``), stops the generation within one token.

        Args:
            messages: A chat or a question.
            cancel: Set it, from any thread, to end the answer where it is.
            options: See :meth:`generate`.
        """
        prompt = stack([self.align(as_chat(messages))])

        def answer(streamer: Any) -> Any:
            return self.answer(prompt, streamer=streamer, **options)

        yield from stream(self.receiver.tokenizer, answer, cancel)

    def align(self, prompt: Prompt) -> AlignedRow:
        """Step 1: tokenize a prompt for every model and align the tokens.

        Raises:
            PromptError: It is empty, or longer than a model's context.
        """
        alignments = [fuser.config.token_alignment for fuser in self.fusers]
        sharers = [(sharer.tokenizer, how) for sharer, how in zip(self.sharers, alignments, strict=True)]
        aligned = align(prompt, self.receiver.tokenizer, sharers, self.fusers[0].config.fuse)
        tokenized = [aligned.receiver, *(sharer for sharer, _ in aligned.sharers)]
        for model, tokens in zip((self.receiver, *self.sharers), tokenized, strict=True):
            if model.context is not None and len(tokens.ids) > model.context:
                raise PromptError(
                    f"expected a prompt of at most {model.context} tokens for {model.name}, "
                    f"got {len(tokens.ids)}; shorten it"
                )
        return aligned

    def answer(
        self,
        prompt: AlignedPrompt,
        *,
        fusers: Sequence[nn.Module] | None = None,
        fuse: Callable[..., FusedPrompt] | None = None,
        **options: Any,
    ) -> Any:
        """Steps 2 to 4: read, fuse and decode.

        Args:
            prompt: The batch.
            fusers: See :meth:`fuse`.
            fuse: In place of :meth:`fuse`, called with ``prompt`` and ``max_cache_len``.
            options: See :meth:`generate`.
        """
        require_options(self.receiver.model, options)
        capacity = static_length(self.receiver.model, prompt.ids.shape[1], options)
        fused = (fuse or partial(self.fuse, fusers=fusers))(prompt, max_cache_len=capacity)
        return self.decode(prompt, fused.cache, response_fuser=fused.response_fuser, **options)

    def prefill(
        self,
        prompt: Aligned,
        *,
        tail: AlignedPrompt | None = None,
        fusers: Sequence[nn.Module] | None = None,
        max_cache_len: int | None = None,
    ) -> Cache | None:
        """Steps 2 and 3 as one: the receiver's fused cache, to be given to :meth:`decode` or to the receiver itself.

        Gradients flow into the fusers unless they are switched off.

        Args:
            prompt: What :meth:`align` gives, one or several, or a batch of it.
            tail: Responses that the receiver will read next, to be fused as well where the fusers were trained to.
            fusers: See :meth:`fuse`.
            max_cache_len: See :meth:`fuse`.

        Returns:
            The receiver's cache of all positions but the last, fused; None for prompts of one token.
        """
        fused = self.fuse(as_prompt(prompt), fusers=fusers, max_cache_len=max_cache_len)
        if tail is not None:
            fused.stage(tail)
        return fused.cache

    def fuse(
        self,
        prompt: AlignedPrompt,
        *,
        caches: ModelCaches | None = None,
        fusers: Sequence[nn.Module] | None = None,
        consume: bool | None = None,
        max_cache_len: int | None = None,
        read_only: bool = False,
    ) -> FusedPrompt:
        """Steps 2 and 3: read a batch of prompts with every model and fuse their caches.

        Args:
            prompt: The batch.
            caches: What :meth:`read` gave; by default the prompt is read.
            fusers: In place of the pair's own; an empty list gives the receiver's own cache.
            consume: Whether the caches may be overwritten: by default those that are read here, not those given.
            max_cache_len: Make the cache a static one of this capacity; by default it grows.
            read_only: Make it a cache that stores nothing, for a run that may be repeated.
        """
        fusers = self.fusers if fusers is None else fusers
        if prompt.ids.shape[1] < 2:  # the only token is the first query
            return FusedPrompt(None)
        # 1) Every model reads the prompt.
        is_fresh = caches is None
        caches = self.read(prompt, len(fusers)) if caches is None else caches
        fuses_response = bool(self.fuse_response and fusers)
        consume = is_fresh if consume is None else consume
        consume = consume and not (fuses_response or read_only or torch.is_grad_enabled())
        with phase("fuse"):
            # 2) The fusers write the sharers' caches into the receiver's.
            fuse_kv = self.fuse_kv if self.store is None or not is_fresh else self._fuse_with_store
            receiver, sharers = read_cache(caches.receiver), [read_cache(cache) for cache in caches.sharers]
            kv = fuse_kv(prompt=prompt, receiver=receiver, sharers=sharers, fusers=fusers, consume=consume)
            # 3) The receiver gets it as a cache of transformers.
            if read_only:
                cache = read_only_cache(caches.receiver, kv)
            else:
                config = self.receiver.model.config
                cache = write_cache(config, caches.receiver, kv, max_cache_len, consume=consume)
        if not fuses_response:
            return FusedPrompt(cache)
        return FusedPrompt(cache, self.response_fuser(prompt, caches, fusers))

    def read(self, prompt: AlignedPrompt, num_sharers: int | None = None) -> ModelCaches:
        """Step 2: the receiver and all sharers, or the first few, read prompts of two tokens or more.

        On one GPU the sharers read at the same time as the receiver; models on several devices overlap anyway.
        """
        beside = fork(self.device)
        receiver = self.read_receiver(prompt)
        with beside:
            return ModelCaches(receiver, self.read_sharers(prompt, num_sharers))

    def read_receiver(self, prompt: AlignedPrompt) -> Cache:
        """The receiver's part of :meth:`read`: a cache of all positions but the last."""
        with phase("receiver_prefill"):
            ids, mask, positions = prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.positions[:, :-1]
            return self._prefill(self.receiver.model, ids, mask, positions)

    def read_sharers(self, prompt: AlignedPrompt, num_sharers: int | None = None) -> list[Cache]:
        """The sharers' part of :meth:`read`."""
        reads = list(zip(self.sharers, prompt.sharers, strict=True))[:num_sharers]
        with phase("sharer_prefill"):
            return [self._prefill(sharer.model, part.ids, part.mask, part.positions) for sharer, part in reads]

    def read_tail(self, prompt: AlignedPrompt, caches: ModelCaches, tail: AlignedPrompt) -> TailKV:
        """Step 2 for responses that are to be fused: every model reads them behind a prompt, which extends its cache.

        Args:
            prompt: The batch.
            caches: What :meth:`read` gave for it.
            tail: See :meth:`prefill`.
        """
        return self.response_fuser(prompt, caches, self.fusers).read(tail)

    def fuse_kv(
        self,
        *,
        prompt: AlignedPrompt,
        receiver: KV,
        sharers: Sequence[KV],
        fusers: Sequence[nn.Module] | None = None,
        consume: bool = False,
    ) -> KV:
        """Step 3 on keys and values: those of a prompt, or of its tail. See :func:`kvfuse.stages.fuse.fuse`."""
        options: dict[str, Any] = {"fusion": self.fusion, "ropes": self.ropes, "consume": consume}
        fusers = self.fusers if fusers is None else fusers
        return fuse(receiver=receiver, sharers=sharers, fusers=fusers, prompt=prompt, **options)

    def select_tokens(
        self, prompt: AlignedPrompt, *, receiver: KV, sharer: KV, index: int = 0, like: Tensor | None = None
    ) -> SelectedTokens | None:
        """The tokens that a fuser sees, as it sees them; see :func:`kvfuse.stages.fuse.select_tokens`.

        ``like`` gives their device and dtype; by default the fuser of that index does.
        """
        like = next(self.fusers[index].parameters()) if like is None else like
        options: dict[str, Any] = {"index": index, "like": like, "ropes": self.ropes}
        return select_tokens(receiver=receiver, sharer=sharer, prompt=prompt, **options)

    def decode(self, prompt: Aligned, cache: Cache | None, **options: Any) -> Any:
        """Step 4: the receiver goes on from a fused cache, which is consumed. Options as those of :meth:`generate`."""
        prompt = as_prompt(prompt)
        options = token_options(self.receiver.model, self.receiver.tokenizer, options)
        if not torch.equal(prompt.positions, count_positions(prompt.mask)):
            options["position_ids"] = prompt.positions.to(self.device)
        return decode(self.receiver.model, prompt.ids, prompt.mask, cache, **options)

    def _prefill(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> Cache:
        if self.store is None:
            return self.prefiller(model, ids, mask, positions)
        return self.store.prefill(model, ids, mask, positions, self.prefiller)

    def _fuse_with_store(self, **caches: Any) -> KV:
        """:meth:`fuse_kv` of a whole prompt, of which the store knows a prefix."""
        assert self.store is not None
        models = [member.model for member in (self.receiver, *self.sharers)]
        return self.store.fuse(models=models, fusion=self.fusion, ropes=self.ropes, **caches)

    def response_fuser(self, prompt: AlignedPrompt, caches: ModelCaches, fusers: Sequence[nn.Module]) -> ResponseFuser:
        """Fuses the responses to a batch, of which ``caches`` hold what :meth:`read` gave."""
        tokens: list[Callable[..., Any]] = [
            partial(
                response_tokens, fuser.config.token_alignment, receiver=self.receiver.tokenizer, sharer=sharer.tokenizer
            )
            for sharer, fuser in zip(self.sharers, self.fusers, strict=True)
        ]
        return ResponseFuser(
            receiver=self.receiver.model,
            sharers=[sharer.model for sharer in self.sharers],
            prompt=prompt,
            caches=caches,
            tokens=tokens,
            fuse=partial(self.fuse_kv, fusers=fusers),
        )

    def fold(self) -> Self:
        """Deprecated name of :meth:`fold_norms`."""
        warnings.warn("pair.fold() is now pair.fold_norms()", DeprecationWarning, stacklevel=2)
        return self.fold_norms()

    def capture(self) -> Self:
        """Deprecated name of :meth:`use_cuda_graphs`."""
        warnings.warn("pair.capture() is now pair.use_cuda_graphs()", DeprecationWarning, stacklevel=2)
        return self.use_cuda_graphs()


def _require_exact(model: LanguageModel, role: str) -> None:
    """Refuse a model that reads several tokens after a filled cache otherwise than one by one."""
    if not model.continues_exactly:
        raise PairError(
            f"expected a {role} that reads several tokens after a filled cache as it reads them one by one, "
            f"got {model.name} ({type(model.model).__name__}), which does not; use another"
        )


def _require_fit(*, receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> None:
    """Refuse a fuser that was trained with other models, or that these models cannot serve."""
    check_identity(receiver, role="receiver", expected=fuser.config.receiver)
    check_identity(sharer, role="sharer", expected=fuser.config.sharer)
    _require_exact(receiver, "receiver")
    if fuser.config.fuse_response:
        _require_exact(sharer, "sharer for fusers of responses")
    alignment = fuser.config.token_alignment
    if alignment == "identity":
        needed, known = len(receiver.tokenizer), sharer.model.get_input_embeddings().num_embeddings
        if known < needed:
            raise PairError(
                f"expected a sharer that can read the receiver's {needed} token ids, "
                f"got {sharer.name} with {known}; use another"
            )
    if fuser.config.fuse_response and alignment == "span" and has_state(sharer.model.config):
        raise PairError(
            f"expected a sharer that can take tokens back, as fusing the response between two tokenizers needs, "
            f"got {sharer.name} with linear attention; use another, or a fuser for prompts alone"
        )


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path) else list(value)
