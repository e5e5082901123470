"""What a fuser is: the receiver's and a sharer's KV in, the residual for the receiver's KV out."""

from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvfuse.cache.transformers_cache import KV, KVSpec
from kvfuse.errors import PairError
from kvfuse.fusers.execution.quantized import FULL, WEIGHTS, quantize_linears_
from kvfuse.fusers.layer_alignment import align_layers

ROPES = ("kept", "removed")


class FuserConfig(PreTrainedConfig):
    """What every fuser knows of the pair it serves, saved beside its weights.

    Attributes:
        receiver: Identity of the receiver: name, KV shape, tokenizer, weights (:class:`kvfuse.language_model.Identity`).
        sharer: Identity of the sharer.
        token_alignment: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        layer_alignment: ``terminal`` | ``depth-normalized`` | one sharer layer per receiver layer.
        fuse: ``all`` | ``messages``: which prompt positions are fused.
        fuse_response: Whether the last prompt token and what is generated are fused as well.
        rope: ``kept`` | ``removed``: whether the fuser sees and changes keys as the caches hold them, or turned back to
            position zero (:mod:`kvfuse.stages.rope`).
        weights: ``full`` | ``int8`` | ``int4``: what the large matrices are (:mod:`kvfuse.fusers.execution.quantized`); trained are full ones.
    """

    receiver: dict[str, Any] = field(default_factory=dict)
    sharer: dict[str, Any] = field(default_factory=dict)
    token_alignment: str = "span"
    layer_alignment: str | list[int] = "terminal"
    fuse: str = "all"
    fuse_response: bool = False
    rope: str = "kept"
    weights: str = FULL

    @property
    def receiver_kv(self) -> KVSpec:
        return KVSpec(**self.receiver["kv"])

    @property
    def sharer_kv(self) -> KVSpec:
        return KVSpec(**self.sharer["kv"])

    @property
    def layers(self) -> list[int]:
        """The sharer layer that feeds each receiver layer."""
        return align_layers(self.receiver_kv.num_layers, self.sharer_kv.num_layers, self.layer_alignment)


class Fuser(PreTrainedModel):
    """Base of all fusers: write :meth:`forward` and :meth:`reset_parameters`.

    A fuser is position-wise: a token's residual depends on that token's KV alone, so it may run on any set of tokens.
    A closed gate gives a residual of exactly zero.

    Attributes:
        sharer_layers: The sharer layer that feeds each receiver layer.
        closed_form: Whether training is one call of :meth:`fit` instead of many steps along a gradient.
        recompute: Whether to keep less for the backward pass and compute it again there; for kinds that can.
    """

    config_class: ClassVar = FuserConfig
    closed_form: ClassVar[bool] = False
    recompute: bool = False
    base_model_prefix = "fuser"
    config: FuserConfig

    def __init__(self, config: FuserConfig) -> None:
        super().__init__(config)
        require_choices(config, rope=ROPES, weights=WEIGHTS)
        self.sharer_layers = config.layers

    def forward(self, receiver: KV, sharer: KV) -> KV:
        """Compute the residual of all layers at once (paper, Eq. 3).

        Args:
            receiver: ``(L_r, B, H_r, T, D_r)``.
            sharer: ``(L_s, B, H_s, T, D_s)``, the same ``T`` tokens.

        Returns:
            What to add to the receiver's keys and values, ``(L_r, B, H_r, T, D_r)``.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the initial weights."""

    def fit(self, batches: Iterable[tuple[KV, KV]]) -> None:
        """Set the parameters in closed form.

        Args:
            batches: The receiver's and the sharer's KV of the same tokens; each is seen once, none need be kept.

        Raises:
            PairError: There are too few.
        """
        raise NotImplementedError

    def set_progress(self, share: float) -> None:
        """Told before every training step which share of the run (0 … 1) is done; for annealing."""

    def gate_parameters(self) -> list[Any]:
        """Parameters that train with their own learning rate and without weight decay."""
        return []

    def open_gates(self) -> dict[str, Tensor]:
        """What is switched on at inference: bool, ``(L,)`` or ``(L, H)``, by the name of what is gated; empty without gates."""
        return {}

    def post_init(self) -> None:
        """transformers' hook, with which every constructor ends: here linear layers become those that the configuration asks for."""
        quantize_linears_(self, self.config.weights)
        super().post_init()

    def train(self, mode: bool = True) -> Self:
        """As of any module. Raises PairError where the weights have no gradient; what is beside them then has none either."""
        if mode:
            require_trainable(self)
        if self.config.weights != FULL:
            self.requires_grad_(False)  # loaded by transformers, every float has one
        return super().train(mode)

    def get_input_embeddings(self) -> None:
        """transformers' hook, which FSDP asks: there are none."""

    def _init_weights(self, module: Any) -> None:
        """transformers' hook; :meth:`reset_parameters` does the work, once for the whole fuser."""


def describe_gates(fuser: Fuser) -> str:
    """One line: how many gates are open, and which layers are closed altogether."""
    gates = fuser.open_gates()
    if not gates:
        return "The fuser has no gates."
    counts = ", ".join(f"{name} {int(opened.sum())} of {opened.numel()}" for name, opened in gates.items())
    shut = {
        name: (~opened.reshape(len(opened), -1).any(1)).nonzero().flatten().tolist() for name, opened in gates.items()
    }
    closed = "; ".join(f"{name} {', '.join(map(str, layers))}" for name, layers in shut.items() if layers)
    return f"Open gates: {counts}." + (f" Closed layers: {closed}." if closed else "")


def require_trainable(fuser: Fuser) -> None:
    """Refuse a fuser that can only be used. Raises PairError where its weights are integers."""
    weights = fuser.config.weights
    if weights != FULL:
        raise PairError(
            f"expected a fuser with full weights to train, got one with {weights}, which have no gradient; train the one it was made of"
        )


def require_choices(config: FuserConfig, **choices: Sequence[str]) -> None:
    """Refuse an option whose value is not one of its choices.

    Raises:
        PairError: Names the option and the choices.
    """
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise PairError(
                f"expected fuser.{name} to be one of {', '.join(known)}, got {getattr(config, name)!r}; choose one"
            )


def require_uniform(config: FuserConfig) -> None:
    """Refuse models whose keys and values differ in shape, for fusers that stack the two.

    Raises:
        PairError: Keys and values have different sizes.
    """
    for whose, spec in (("receiver", config.receiver_kv), ("sharer", config.sharer_kv)):
        if spec.key_dim != spec.value_dim:
            raise PairError(
                f"expected a {whose} with keys and values of one size, got {spec}; use another fuser or model"
            )
