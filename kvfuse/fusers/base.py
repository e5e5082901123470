"""The contract of a fuser: the receiver's and a sharer's keys and values in, the residual for the receiver's out."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from huggingface_hub import CommitInfo, HfApi
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvfuse.cache.kv import KV, KVSpec
from kvfuse.errors import CheckpointError, PairError
from kvfuse.fusers import folder as fuser_folder
from kvfuse.fusers.layer_alignment import align_layers
from kvfuse.fusers.registry import class_of
from kvfuse.support.hub import pop_download

ROPES = ("kept", "removed")


class FuserConfig(PreTrainedConfig):
    """What every fuser knows of the pair it serves, saved beside its weights.

    Attributes:
        receiver: Identity of the receiver: name, KV shape, tokenizer, weights
            (:class:`kvfuse.language_model.Identity`).
        sharer: Identity of the sharer.
        token_alignment: One of :data:`kvfuse.prompts.alignment.TOKEN_ALIGNMENTS`.
        layer_alignment: ``terminal`` | ``depth-normalized`` | one sharer layer per receiver layer.
        fuse: ``all`` | ``messages``: the prompt positions that are fused.
        fuse_response: Whether the last prompt token and the generated tokens are fused as well.
        rope: ``kept`` | ``removed``: whether the fuser sees and changes keys as the caches hold them, or with the
            rotary embedding removed (:mod:`kvfuse.stages.rope`).
        weights: ``full`` | ``int8`` | ``int4``: the format of the large matrices
            (:mod:`kvfuse.fusers.execution.quantized`); only full ones can be trained.
    """

    receiver: dict[str, Any] = field(default_factory=dict)
    sharer: dict[str, Any] = field(default_factory=dict)
    token_alignment: str = "span"
    layer_alignment: str | list[int] = "terminal"
    fuse: Literal["all", "messages"] = "all"
    fuse_response: bool = False
    rope: str = "kept"
    weights: str = "full"

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

    A fuser is position-wise: the residual of a token depends on that token's keys and values only, so a fuser may run
    on any set of tokens. A closed gate gives a residual of exactly zero.

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
        require_choices(config, rope=ROPES)
        self.sharer_layers = config.layers

    def forward(self, *, receiver: KV, sharer: KV) -> KV:
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
            batches: The receiver's and the sharer's KV of the same tokens; each is read once.

        Raises:
            PairError: There are too few.
        """
        raise NotImplementedError

    def prepare(self, batches: Iterable[tuple[KV, KV]]) -> None:
        """Called once before training, for kinds that start from statistics of their inputs; default: no-op.

        Args:
            batches: As in :meth:`fit`, of a few training examples; read when they are asked for.
        """

    def set_progress(self, share: float) -> None:
        """Called before every training step with the share of the run (0 … 1) that is done; for annealing."""

    def gate_parameters(self) -> list[Any]:
        """Parameters that train with their own learning rate and without weight decay."""
        return []

    def open_gates(self) -> dict[str, Tensor]:
        """The gates that are open at inference, bool ``(L,)`` or ``(L, H)``, by what they gate; empty without gates."""
        return {}

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, how many there are, and how large they are."""
        counts = [(parameter.numel(), parameter.nbytes, parameter.requires_grad) for parameter in self.parameters()]
        total, nbytes = sum(count for count, _, _ in counts), sum(size for _, size, _ in counts)
        trainable = sum(count for count, _, trains in counts if trains)
        share = 100 * trainable / max(total, 1)
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || "
            f"trainable%: {share:.2f} || {nbytes / 1e6:.2f} MB"
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, subfolder: str = "", **options: Any) -> Self:
        """Load a fuser of our format, after checking that it is whole.

        Called on :class:`Fuser`, it returns a fuser of whatever kind the folder holds. The authors' format is read by
        :func:`kvfuse.load_fuser`, which reads ours too.

        Args:
            source: Folder or Hub id.
            args: For transformers' ``from_pretrained``.
            subfolder: Folder inside of it.
            options: For transformers' ``from_pretrained``, e.g. ``dtype``; ``revision`` for the Hub.

        Raises:
            CheckpointError: The folder, or a file in it, is missing, damaged, a pickle, or no fuser of this kind, or a
                weight is NaN or infinite.
        """
        folder = fuser_folder.locate(source, subfolder, **pop_download(options))
        kind = class_of(fuser_folder.read_config(folder))
        if not issubclass(kind, cls):
            raise CheckpointError(f"expected a {cls.__name__} in {folder}, got a {kind.__name__}; load it with Fuser")
        options = {"dtype": "auto", **options, "output_loading_info": True}
        fuser, report = super(Fuser, kind).from_pretrained(folder, *args, **options)
        fuser_folder.require_all_weights(folder, report)
        fuser_folder.require_finite(fuser.state_dict().items(), folder / fuser_folder.WEIGHTS)
        return fuser.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, notes: str = "", **options: Any) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card, or nothing.

        Args:
            folder: Replaced if it holds a fuser; other files in it are kept.
            notes: Markdown for the end of the model card, e.g. what was measured.
            options: For transformers' ``save_pretrained``.

        Raises:
            CheckpointError: ``folder`` holds something that is not a fuser.
        """
        save: Callable[..., None] = super().save_pretrained
        if not options.get("is_main_process", True):  # of several processes, which gather the weights together
            return save(folder, **options)

        def write(fresh: Path) -> None:
            save(fresh, **options)
            (fresh / fuser_folder.CARD).write_text(fuser_folder.model_card(self, notes), encoding="utf-8")

        fuser_folder.write(Path(folder), write)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        notes: str = "",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload fuser",
    ) -> CommitInfo:
        """Upload configuration, weights and model card; transformers' own method would replace the card by a template.

        Args:
            repo_id: Name of the repository, which is made if it is not there.
            notes: See :meth:`save_pretrained`.
            private: Whether a new repository is private.
            token: Of the Hub; by default the one of ``hf auth login``.
            revision: Branch to upload to.
            create_pr: Whether to open a pull request.
            commit_message: Of the upload.
        """
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder, "fuser")
            self.save_pretrained(fresh, notes=notes)
            options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
            return api.upload_folder(repo_id=repo, folder_path=fresh, **options)

    def get_input_embeddings(self) -> None:
        """Called by FSDP through transformers: a fuser has none."""

    def _init_weights(self, module: Any) -> None:
        """Called by transformers; :meth:`reset_parameters` does the work, once for the whole fuser."""


def describe_gates(fuser: Fuser) -> str:
    """One line: how many gates are open, and which layers are closed altogether."""
    gates = fuser.open_gates()
    if not gates:
        return "The fuser has no gates."
    counts, closed = [], []
    for name, opened in gates.items():
        counts.append(f"{name} {int(opened.sum())} of {opened.numel()}")
        layers = (~opened.reshape(len(opened), -1).any(1)).nonzero().flatten().tolist()
        if layers:
            closed.append(f"{name} {', '.join(map(str, layers))}")
    text = f"Open gates: {', '.join(counts)}."
    return text + (f" Closed layers: {'; '.join(closed)}." if closed else "")


def require_choices(config: FuserConfig, **choices: Sequence[str]) -> None:
    """Refuse an option whose value is not one of its choices.

    Raises:
        PairError: Names the option and the choices.
    """
    for name, known in choices.items():
        got = getattr(config, name)
        if got not in known:
            raise PairError(f"expected fuser.{name} to be one of {', '.join(known)}, got {got!r}; choose one")


def require_uniform(config: FuserConfig) -> None:
    """Refuse models whose keys and values differ in shape, for fusers that stack the two.

    Raises:
        PairError: Keys and values have different sizes.
    """
    for role, spec in (("receiver", config.receiver_kv), ("sharer", config.sharer_kv)):
        if spec.key_dim != spec.value_dim:
            raise PairError(
                f"expected a {role} with keys and values of one size, got {spec}; use another fuser or model"
            )
