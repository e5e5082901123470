"""Two models, or more, that answer together: align, prefill, fuse, decode, in that order."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvfuse.backends.cuda_graphs import CudaGraphPrefill
from kvfuse.cache.transformers_cache import KV, has_state, read_cache, write_cache
from kvfuse.checkpoint import load_fuser
from kvfuse.errors import PairError, PromptError
from kvfuse.fusers import Fuser
from kvfuse.fusers.execution.fold_norms import fold
from kvfuse.language_model import LanguageModel, check_identity
from kvfuse.prompts.alignment import AlignedPrompt, AlignedRow, align, count_positions, stack
from kvfuse.prompts.chat import Prompt, as_chat
from kvfuse.stages.decode import decode, static_length, stream
from kvfuse.stages.fuse import FUSIONS, fuse
from kvfuse.stages.phases import phase
from kvfuse.stages.prefill import Prefill, beside, fork, prefill
from kvfuse.stages.prefix_store import PrefixStore
from kvfuse.stages.response_fusion import ModelCaches, ResponseFuser


class CacheToCache:
    """A receiver that answers from its own KV-cache and the caches of one or more sharers.

    Args:
        receiver: The model that answers.
        sharers: The models that only read.
        fusers: One per sharer, trained for exactly this pair.
        fusion: How several sharers come together, ``parallel`` or ``sequential`` (:func:`kvfuse.stages.fuse.fuse`).
        store: Where caches of prompts are kept for those that begin alike; by default they are not.

    Raises:
        PairError: A fuser belongs to another pair.
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
            check_identity("receiver", fuser.config.receiver, receiver)
            check_identity("sharer", fuser.config.sharer, sharer)
            if fuser.config.token_alignment == "identity":
                _require_same_ids(receiver, sharer)
            if fuser.config.fuse_response and fuser.config.token_alignment == "span" and has_state(sharer.model.config):
                raise PairError(
                    f"expected a sharer that can take tokens back, as fusing the response between two tokenizers needs, "
                    f"got {sharer.name} with linear attention; use another, or a fuser for prompts alone"
                )
        if len({(fuser.config.fuse, fuser.config.fuse_response) for fuser in fusers}) > 1:
            raise PairError(
                "expected fusers that fuse the same positions, got fusers for different ones; train them alike"
            )
        self.receiver, self.sharers, self.fusers, self.fusion, self.store = (
            receiver,
            list(sharers),
            list(fusers),
            fusion,
            store,
        )
        self.prefiller: Prefill = prefill
        removed = [fuser.config.rope == "removed" for fuser in fusers]
        self.ropes = [
            (receiver.rope, one.rope) if turned else None for one, turned in zip(sharers, removed, strict=True)
        ]

    @classmethod
    def from_pretrained(
        cls,
        receiver: str | Path | None = None,
        sharer: str | Path | Sequence[str | Path] | None = None,
        fuser: str | Path | Sequence[str | Path] = (),
        subfolder: str | Sequence[str] = "",
        fusion: str = "parallel",
        sharer_options: dict[str, Any] | None = None,
        store: PrefixStore | None = None,
        **model_options: Any,
    ) -> Self:
        """Load models and fusers from local folders or the Hub.

        Args:
            receiver: Folder or Hub id; by default the one that the first fuser names.
            sharer: One or more; by default those that the fusers name.
            fuser: One per sharer, in the same order; ours or the authors'.
            subfolder: Folder of the fuser inside of ``fuser``, or one for each.
            fusion: See :class:`CacheToCache`.
            sharer_options: For the sharers in place of ``model_options``, name by name, e.g. ``{"device_map": "cuda:1"}``.
            store: See :class:`CacheToCache`.
            model_options: For all models, e.g. ``dtype``, ``device_map``, ``quantization_config``.

        Raises:
            PairError: Models and fusers that do not fit, or a model that is not there.
            CheckpointError: A fuser that is missing or damaged.
        """
        sources = _as_list(fuser)
        subfolders = [subfolder] * len(sources) if isinstance(subfolder, str) else subfolder
        fusers = [load_fuser(one, inside) for one, inside in zip(sources, subfolders, strict=True)]
        if not fusers:
            raise PairError("expected at least one fuser, got none; name a fuser's folder or Hub id")
        names = [receiver or fusers[0].config.receiver["name"]]
        names += _as_list(sharer) if sharer is not None else [one.config.sharer["name"] for one in fusers]
        first = LanguageModel.from_pretrained(names[0], **model_options)
        sharers = [
            LanguageModel.from_pretrained(name, **{**model_options, **(sharer_options or {})}) for name in names[1:]
        ]
        for one in fusers:  # never computed in less than it was trained in, nor in less than the receiver
            one.to(first.model.device, torch.promote_types(one.dtype, first.model.dtype))
        return cls(first, sharers, fusers, fusion, store)

    @property
    def fuse_response(self) -> bool:
        """Whether the last prompt token and what is generated are fused as well, as the fusers were trained to."""
        return self.fusers[0].config.fuse_response

    def fold(self) -> Self:
        """Multiply the weights of the fusers' norms into the products behind them, in place: fewer steps, the same but for rounding.

        For answering alone: what is folded can be neither trained nor saved any more.
        """
        for fuser in self.fusers:
            fold(fuser.eval().requires_grad_(False))
        return self

    def capture(self) -> Self:
        """Read prompts without padding through CUDA graphs (:mod:`kvfuse.backends.cuda_graphs`); on a CPU nothing changes.

        A length is recorded when it is first read, which takes as long as reading it some times and keeps a cache of its size. The models
        must stay on their devices.
        """
        self.prefiller = CudaGraphPrefill()
        return self

    def select(self, *sharers: int) -> Self:
        """The same models with only some of the sharers, named by their place; for one request, at no cost."""
        if not sharers or not all(0 <= place < len(self.sharers) for place in sharers):
            raise PairError(
                f"expected places of sharers from 0 to {len(self.sharers) - 1}, got {sharers}; choose at least one of them"
            )
        chosen = [self.sharers[i] for i in sharers], [self.fusers[i] for i in sharers]
        pair = type(self)(self.receiver, *chosen, self.fusion, self.store)
        pair.prefiller = self.prefiller
        return pair

    @torch.no_grad()
    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Continue a batch of prompts with transformers' ``generate``.

        Args:
            prompts: Texts and chats; one alone is a batch of one.
            options: Any of ``generate``: ``max_new_tokens``, sampling, beams, ``streamer``, …

        Returns:
            ``(B, T + new)`` int64 ids of the receiver, or what ``return_dict_in_generate`` asks for.

        Raises:
            PromptError: A prompt is empty, or longer than a model's context.
        """
        return self.answer(stack([self.align(prompt) for prompt in _as_batch(prompts)]), **options)

    @torch.no_grad()
    def chat(self, messages: Prompt, **options: Any) -> str:
        """Answer one chat, or one question, as text. ``options`` are those of :meth:`generate`."""
        prompt = stack([self.align(as_chat(messages))])
        ids = self.answer(prompt, **options)
        return self.receiver.tokenizer.decode(ids[0, prompt.ids.shape[1] :], skip_special_tokens=True)

    def stream(self, messages: Prompt, **options: Any) -> Iterator[str]:
        """Answer one chat piece by piece, as it is generated. ``options`` are those of :meth:`generate`."""
        prompt = stack([self.align(as_chat(messages))])
        yield from stream(self.receiver.tokenizer, lambda streamer: self.answer(prompt, streamer=streamer, **options))

    def answer(self, prompt: AlignedPrompt, fusers: Sequence[nn.Module] | None = None, **options: Any) -> Any:
        """Steps 2 to 4: read, fuse and decode. ``fusers`` as in :meth:`prefill`, the rest as in :meth:`generate`."""
        fusers = self.fusers if fusers is None else fusers
        room = static_length(self.receiver.model, prompt.ids.shape[1], options)
        if not (self.fuse_response and fusers) or prompt.ids.shape[1] < 2:
            return self.decode(prompt, self.prefill(prompt, fusers, room), **options)
        streams = self.read(prompt)
        cache = self.fuse(prompt, streams, fusers, room, as_read=True)
        sharers = [
            (sharer, fuser.config.token_alignment) for sharer, fuser in zip(self.sharers, self.fusers, strict=True)
        ]
        follower = ResponseFuser(self.receiver, sharers, prompt, streams, partial(self.fuse_kv, fusers=fusers))
        return self.decode(prompt, cache, follower=follower, **options)

    def align(self, prompt: Prompt) -> AlignedRow:
        """Step 1: tokenize a prompt for every model and align it.

        Raises:
            PromptError: It is empty, or longer than a model's context.
        """
        sharers = [
            (sharer.tokenizer, fuser.config.token_alignment)
            for sharer, fuser in zip(self.sharers, self.fusers, strict=True)
        ]
        aligned = align(prompt, self.receiver.tokenizer, sharers, self.fusers[0].config.fuse)
        _require_room(self.receiver, len(aligned.receiver.ids))
        for sharer, (reading, _) in zip(self.sharers, aligned.sharers, strict=True):
            _require_room(sharer, len(reading.ids))
        return aligned

    def read(self, prompt: AlignedPrompt, num_sharers: int | None = None) -> ModelCaches:
        """Step 2: every model, or the receiver and the first few sharers, reads a prompt of two tokens or more.

        On one GPU the sharers read beside the receiver; models on several devices work at the same time by themselves.
        """
        stream = fork(self.receiver.model.device)
        receiver = self.read_receiver(prompt)
        with beside(stream):
            return ModelCaches(receiver, self.read_sharers(prompt, num_sharers))

    def read_receiver(self, prompt: AlignedPrompt) -> Cache:
        """The receiver's part of :meth:`read`: a cache of all positions but the last."""
        with phase("receiver_prefill"):
            return self._prefill(self.receiver.model, prompt.ids[:, :-1], prompt.mask[:, :-1], prompt.positions[:, :-1])

    def read_sharers(self, prompt: AlignedPrompt, num_sharers: int | None = None) -> list[Cache]:
        """The sharers' part of :meth:`read`."""
        read = list(zip(self.sharers, prompt.sharers, strict=True))[:num_sharers]
        with phase("sharer_prefill"):
            return [self._prefill(sharer.model, reads.ids, reads.mask, reads.positions) for sharer, reads in read]

    def fuse(
        self,
        prompt: AlignedPrompt,
        streams: ModelCaches,
        fusers: Sequence[nn.Module],
        max_cache_len: int | None = None,
        use_up: bool = False,
        as_read: bool = False,
    ) -> Cache:
        """Step 3: the receiver's cache, fused. Arguments as :meth:`prefill`.

        Args:
            prompt: A batch.
            streams: What :meth:`read` gave.
            fusers: As in :meth:`prefill`.
            max_cache_len: As in :meth:`prefill`.
            use_up: Nobody needs ``streams`` any more: without gradients, the receiver's cache is fused in place, not copied.
            as_read: Nobody has changed ``streams`` since this prompt was read: what the store has fused of it is not fused again.
        """
        with phase("fuse"):
            receiver, sharers = read_cache(streams.receiver), list(map(read_cache, streams.sharers))
            in_place = use_up and not torch.is_grad_enabled()
            if self.store is None or not as_read:
                fused = self.fuse_kv(prompt, receiver, sharers, fusers, in_place)
            else:
                models = [one.model for one in (self.receiver, *self.sharers)]
                fused = self.store.fuse(models, receiver, sharers, fusers, prompt, self.fusion, self.ropes, in_place)
            return write_cache(self.receiver.model.config, streams.receiver, fused, max_cache_len, take_over=in_place)

    def fuse_kv(
        self,
        prompt: AlignedPrompt,
        receiver: KV,
        sharers: Sequence[KV],
        fusers: Sequence[nn.Module],
        in_place: bool = False,
    ) -> KV:
        """The receiver's keys and values of a prompt, or of its tail, fused. See :func:`kvfuse.stages.fuse.fuse`."""
        return fuse(receiver, sharers, fusers, prompt, self.fusion, self.ropes, in_place)

    def prefill_response(
        self,
        streams: ModelCaches,
        prompt: AlignedPrompt,
        tail: AlignedPrompt,
        fusers: Sequence[nn.Module] | None = None,
    ) -> KV:
        """Read responses at once, where they are fused too: what :class:`ResponseFuser` does token by token.

        Args:
            streams: Caches of the prompt, which are filled further.
            prompt: What is in them.
            tail: ``(B, k)``: the last prompt token and the response, padded right; each sharer's begins with its last prompt
                token, which it has read.
            fusers: As in :meth:`prefill`.

        Returns:
            ``(L, B, H, k, D)``: fused keys and values of the tail.
        """
        seen = torch.cat([prompt.mask[:, :-1], tail.mask], dim=1)
        prefill(self.receiver.model, tail.ids, seen, tail.positions, streams.receiver)
        for sharer, cache, before, reads in zip(
            self.sharers, streams.sharers, prompt.sharers, tail.sharers, strict=True
        ):
            seen = torch.cat([before.mask, reads.mask[:, 1:]], dim=1)
            prefill(sharer.model, reads.ids[:, 1:], seen, reads.positions[:, 1:], cache)
        theirs = [
            read_cache(cache, last=reads.ids.shape[1])
            for cache, reads in zip(streams.sharers, tail.sharers, strict=True)
        ]
        return self.fuse_kv(
            tail,
            read_cache(streams.receiver, last=tail.ids.shape[1]),
            theirs,
            self.fusers if fusers is None else fusers,
        )

    def prefill(
        self, prompt: AlignedPrompt, fusers: Sequence[nn.Module] | None = None, max_cache_len: int | None = None
    ) -> Cache | None:
        """Steps 2 and 3: read the prompt with every model and fuse their caches.

        Gradients flow into the fusers unless they are switched off.

        Args:
            prompt: A batch.
            fusers: In place of the pair's own; an empty list gives the receiver's own cache.
            max_cache_len: Make it a static cache with room for so many positions; by default it grows.

        Returns:
            The receiver's cache of all positions but the last, fused; None for prompts of one token.
        """
        if prompt.ids.shape[1] < 2:
            return None
        fusers = self.fusers if fusers is None else fusers
        return self.fuse(prompt, self.read(prompt, len(fusers)), fusers, max_cache_len, use_up=True, as_read=True)

    def decode(self, prompt: AlignedPrompt, cache: Cache | None, **options: Any) -> Any:
        """Step 4: let the receiver go on from a fused cache, which is used up. Arguments and result as :meth:`generate`."""
        tokenizer = self.receiver.tokenizer
        options.setdefault(
            "pad_token_id", tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        if not torch.equal(prompt.positions, count_positions(prompt.mask)):
            options["position_ids"] = prompt.positions.to(self.receiver.model.device)
        return decode(self.receiver.model, prompt.ids, prompt.mask, cache, **options)

    def _prefill(self, model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor) -> Cache:
        if self.store is None:
            return self.prefiller(model, ids, mask, positions)
        return self.store.prefill(model, ids, mask, positions, self.prefiller)


def _require_same_ids(receiver: LanguageModel, sharer: LanguageModel) -> None:
    """Refuse a sharer without an embedding for every id it will be given."""
    needed, known = len(receiver.tokenizer), sharer.model.get_input_embeddings().num_embeddings
    if known < needed:
        raise PairError(
            f"expected a sharer that can read the receiver's {needed} token ids, got {sharer.name} with {known}; use another"
        )


def _require_room(model: LanguageModel, length: int) -> None:
    if model.context is not None and length > model.context:
        raise PromptError(
            f"expected a prompt of at most {model.context} tokens for {model.name}, got {length}; shorten it"
        )


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | Path) else list(value)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt alone as a batch of one; a batch as it is."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    return cast("Sequence[Prompt]", [prompts] if single else prompts)
