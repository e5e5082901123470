"""Can one model's cache be mapped into the other's, and how much of the target's space does the map reach?

The transformation oracle (paper, 3.2): a multilayer perceptron of three layers learns, from the sharer's keys and
values of a token in one layer, those of the receiver, by mean squared error; ridge regression is fitted for comparison.
Prompts are split, not tokens. Two figures locate the mapped tokens: ``inside`` is the share of them within the balls
around the target's tokens that reach to their k-th nearest neighbours (precision: Kynkäänniemi et al. 2019),
``reached`` the share of these balls that hold a mapped token (coverage: Naeem et al. 2020). The same figures of the
target's own other half are the ceiling.

Quality is the effect on the receiver when the mapped layer replaces its own: the divergence of its first-token
distribution. Rank correlations over maps of all stages of training show how well the cosine of that layer's attention
output, or the error of the map, predicts it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.hooks import observe
from kvfuse.analysis.maps import NEIGHBOURS, Map, Standardizer, coverage, mean, perceptrons, ridge
from kvfuse.analysis.readout import ReadBatch, read_batches
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.stages.fuse import SelectedTokens
from kvfuse.support import plots

CLOUDS = ("sharer", "receiver", "mapped")
STAGES = (0, 20, 60, 150, 400, 1000)
MAX_SMOKE_STEPS = 60
PREDICTORS = {"attention_cosine": "cosine of attention outputs", "validation_mse": "error of the map (MSE)"}


class LayerTokens:
    """One layer's keys and values, side by side, of the aligned tokens of both models.

    Args:
        study: The pair, and the questions that it reads.
        layer: The receiver's layer; the sharer's is the one that the fuser reads for it.

    Attributes:
        sharer: ``(N, P)`` float32.
        receiver: ``(N, C)`` float32.
    """

    def __init__(self, study: Study, layer: int) -> None:
        self.layer, source = layer, study.pair.fusers[0].sharer_layers[layer]
        picks = (
            (batch, batch.select_tokens(torch.empty(0, device=batch.clean.key.device))) for batch in read_batches(study)
        )
        self.batches = [(batch, picked) for batch, picked in picks if picked is not None]
        if not self.batches:
            raise AnalysisError("expected prompts with tokens that both models share, got none; use other data")
        self.sharer = torch.cat([flat(picked.sharer, source) for _, picked in self.batches])
        self.receiver = torch.cat([flat(picked.receiver, layer) for _, picked in self.batches])

    def replaced(self, run: Map) -> list[tuple[ReadBatch, KV]]:
        """Each batch with the receiver's cache in which the mapped layer replaces its own at the aligned tokens."""
        mapped = run(self.sharer).split([len(picked.rows) for _, picked in self.batches])
        return [
            (batch, self._replace(batch, picked, rows))
            for (batch, picked), rows in zip(self.batches, mapped, strict=True)
        ]

    def _replace(self, batch: ReadBatch, picked: SelectedTokens, mapped: Tensor) -> KV:
        # 1) Mapped minus own, in this layer alone: what to add. Keys are at position zero where the fuser sees them so.
        residual = picked.receiver.zeros_like()  # (L, 1, H, N, D)
        _, _, heads, _, key_dim = residual.key.shape
        key, value = mapped.split([heads * key_dim, heads * residual.value.shape[-1]], dim=1)  # (N, H D) each
        for part, own, rows in (
            (residual.key, picked.receiver.key, key),
            (residual.value, picked.receiver.value, value),
        ):
            part[self.layer, 0] = rows.unflatten(1, (heads, -1)).transpose(0, 1).to(part) - own[self.layer, 0]
        # 2) Back to the tokens' own positions, and into the cache.
        residual = residual if picked.rope is None else picked.rope.apply(residual)
        return batch.clean.add_tokens(picked.rows, picked.positions, residual)


def run(
    study: Study, layer: int = -1, questions: int = 160, hidden: int = 256, samples: int = 300, perplexity: float = 50
) -> Finding:
    """Fit the maps and measure where they lead.

    Args:
        study: A pair with prompts; answers are not needed.
        layer: The receiver's; by default its last, as in the paper.
        questions: Number of prompts to read; a quarter of them validates.
        hidden: Width of the perceptron.
        samples: Validation tokens to draw and to measure neighbours among.
        perplexity: Of t-SNE, at most a quarter of the points.

    Raises:
        AnalysisError: There is no such layer, too few prompts, or scikit-learn is missing.
    """
    _require_sklearn()
    layers = study.pair.receiver.kv_spec.num_layers
    if not -layers <= layer < layers:
        raise AnalysisError(f"expected layer from {-layers} to {layers - 1}, got {layer}; choose one of the receiver's")
    asked = study.spread(questions)
    if len(asked.questions) < 2:
        raise AnalysisError(f"expected two prompts or more, got {len(asked.questions)}; give more data")
    # 1) Read both splits: every fourth prompt validates.
    splits = [
        replace(asked, questions=[asked.questions[i] for i in range(len(asked.questions)) if (i % 4 == 1) == validates])
        for validates in (False, True)
    ]
    with torch.no_grad():
        training, validation = (LayerTokens(split, layer % layers) for split in splits)
    # 2) Fit maps of all kinds, the perceptron at several stages.
    data = {"source": training.sharer, "target": training.receiver}
    stages = [stage for stage in STAGES if not study.smoke or stage <= MAX_SMOKE_STEPS]
    trained = [f"mlp, {stage} steps" for stage in stages]
    maps = {"mean": mean(training.receiver), "ridge": ridge(**data)}
    stages_of_mlp = perceptrons(**data, hidden=hidden, stages=stages, seed=study.seed)
    maps |= dict(zip(trained, stages_of_mlp, strict=True))
    # 3) Their errors, their effect on the receiver, and the space that the last one reaches.
    with torch.no_grad():
        quality = {
            name: {**_errors(fitted, training=training, validation=validation), **_effect(fitted, validation)}
            for name, fitted in maps.items()
        }
        clouds, volume = picture(validation, maps[trained[-1]], samples, perplexity, study.seed)
    figures = {
        "layer": layer % layers,
        "prompts": {name: len(split.questions) for name, split in zip(("training", "validation"), splits, strict=True)},
        "tokens": {"training": len(training.sharer), "validation": len(validation.sharer)},
        "maps": quality,
        "predictors": predictors(list(quality.values())),
        "volume": volume,
        "clouds": clouds,
    }
    return Finding(figures, reading(figures), lambda: draw(figures))


def flat(kv: KV, layer: int) -> Tensor:
    """``(N, H D_k + H D_v)`` float32: keys, then values, of picked tokens in one layer."""
    return torch.cat([part[layer, 0].transpose(0, 1).flatten(1) for part in (kv.key, kv.value)], dim=1).float()


def picture(
    tokens: LayerTokens, run: Map, samples: int, perplexity: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the clouds of :data:`CLOUDS` in the plane, by PCA and by t-SNE, and the coverage of the receiver's cloud.

    Where the two models' sizes differ, the sharer's tokens are shown by as many of their own principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # 1) Draw tokens; standardize each model's by its own mean and scale.
    order = np.random.default_rng(seed).permutation(len(tokens.sharer))
    chosen, others = order[:samples], order[samples : 2 * samples]
    standardize = Standardizer(tokens.receiver)
    target, mapped = (standardize(part).cpu().numpy() for part in (tokens.receiver, run(tokens.sharer)))
    source = Standardizer(tokens.sharer)(tokens.sharer).cpu().numpy()
    # 2) Coverage of the target, by the map and by the target's own other half.
    volume = {"mapped": coverage(target=target[chosen], points=mapped[chosen])}
    if len(others) > NEIGHBOURS:
        volume["target's other half"] = coverage(target=target[chosen], points=target[others])
    # 3) Bring all clouds to one number of dimensions, then to two.
    clouds = [source[chosen], target[chosen], mapped[chosen]]
    if source.shape[1] != target.shape[1]:
        width = min(target.shape[1], source.shape[1], len(chosen))
        space = PCA(width, random_state=seed).fit(clouds[1])
        clouds = [PCA(width, random_state=seed).fit_transform(clouds[0]), *map(space.transform, clouds[1:])]
    points = np.concatenate(clouds)
    tsne = TSNE(perplexity=min(perplexity, len(points) / 4), max_iter=1000, init="pca", random_state=seed)
    planes = {"PCA": PCA(2, random_state=seed).fit_transform(points), "t-SNE": tsne.fit_transform(points)}
    return {
        name: dict(zip(CLOUDS, (np.round(cloud, 3).tolist() for cloud in np.split(plane, 3)), strict=True))
        for name, plane in planes.items()
    }, volume


def predictors(maps: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Spearman's rank correlation of the divergence with the error and with the cosine, over maps; None: undefined."""
    from scipy.stats import spearmanr

    divergences = [row["divergence"] for row in maps]
    found = {name: float(spearmanr([row[name] for row in maps], divergences).statistic) for name in PREDICTORS}
    return {name: None if np.isnan(value) else value for name, value in found.items()}


def reading(figures: dict[str, Any]) -> str:
    """Two sentences: where the maps lead, and what that does to the receiver."""
    maps, volume = figures["maps"], figures["volume"]
    last = list(maps)[-1]
    half = volume.get("target's other half")
    ceiling = f" (the target's own other half: {100 * half['reached']:.0f}%)" if half else ""
    cosine, error = (
        "undefined" if figures["predictors"][name] is None else f"{figures['predictors'][name]:+.2f}"
        for name in PREDICTORS
    )
    return (
        f"On prompts held out, ridge explains {100 * maps['ridge']['validation_r2']:.0f}% and the perceptron "
        f"{100 * maps[last]['validation_r2']:.0f}% of the variance of the receiver's layer {figures['layer']}; "
        f"{100 * volume['mapped']['inside']:.0f}% of the mapped tokens lie inside of its space and reach "
        f"{100 * volume['mapped']['reached']:.0f}% of it{ceiling}. With this layer mapped, the receiver's first token "
        f"departs by {maps[last]['divergence']:.3f} nats from its own (with the mean instead: "
        f"{maps['mean']['divergence']:.3f}); over {len(maps)} maps that has a rank correlation of {cosine} with the "
        f"cosine of attention outputs and of {error} with the error."
    )


@plots.styled
def draw(figures: dict[str, Any]) -> plots.Figure:
    """Three clouds by PCA and by t-SNE; below, the divergence of the first token against its two predictors."""
    figure, panels = plots.new_panels(7.4, 2, 2)
    for axes, (name, clouds) in zip(panels[:2], figures["clouds"].items(), strict=True):
        for cloud, (colour, marker) in zip(CLOUDS, plots.LOOKS, strict=False):
            x, y = np.array(clouds[cloud]).T
            axes.plot(x, y, marker, color=colour, markersize=3.5, alpha=0.7, markeredgewidth=0, label=cloud)
        axes.set_title(name)
        axes.set(xlabel="first dimension (no unit)")
    for axes, (field, label) in zip(panels[2:], PREDICTORS.items(), strict=True):
        _draw_maps(axes, figures["maps"], field)
        axes.set(xlabel=label, ylim=(0, None))
        axes.margins(0.2, 0.15)
    panels[0].set_ylabel("second dimension")
    panels[2].set_ylabel("divergence of the first token (nats)")
    panels[3].legend(loc="lower right")
    plots.legend_above(figure, list(panels[0].lines))
    return figure


def _draw_maps(axes: plots.Axes, maps: Mapping[str, Mapping[str, float]], field: str) -> None:
    """The perceptron's stages in their order, the first and the last named, and the other maps."""
    stages = {name.removeprefix("mlp, "): figures for name, figures in maps.items() if name.startswith("mlp")}
    groups = {"perceptron while trained": list(stages.values()), **{name: [maps[name]] for name in ("mean", "ridge")}}
    for (name, rows), (colour, marker) in zip(groups.items(), plots.LOOKS[2:], strict=False):
        x, y = [row[field] for row in rows], [row["divergence"] for row in rows]
        axes.plot(x, y, f"-{marker}", color=colour, markersize=7, linewidth=0.8, label=name)
    for name in (next(iter(stages)), list(stages)[-1]):
        point = stages[name][field], stages[name]["divergence"]
        axes.annotate(name, point, (6, -13), textcoords="offset points", fontsize=8)


def _errors(run: Map, *, training: LayerTokens, validation: LayerTokens) -> dict[str, float]:
    """Mean squared errors, and the share of variance explained on the validation tokens."""
    error = nn.functional.mse_loss
    fitted, found = (error(run(tokens.sharer), tokens.receiver).item() for tokens in (training, validation))
    baseline = error(mean(training.receiver)(validation.receiver), validation.receiver).item()
    return {"training_mse": fitted, "validation_mse": found, "validation_r2": 1 - found / baseline}


def _effect(run: Map, tokens: LayerTokens) -> dict[str, float]:
    """Mean cosine of the layer's attention output, and mean KL(own || mapped) of the first token, over prompts."""
    cosines, divergences = [], []
    for batch, kv in tokens.replaced(run):
        own, own_words = _attend(batch, batch.clean, tokens.layer)
        mapped, mapped_words = _attend(batch, kv, tokens.layer)
        cosines.append(nn.functional.cosine_similarity(own, mapped, dim=-1))
        divergences.append((own_words.exp() * (own_words - mapped_words)).sum(-1))
    return {"attention_cosine": float(torch.cat(cosines).mean()), "divergence": float(torch.cat(divergences).mean())}


def _attend(batch: ReadBatch, kv: KV, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's attention output for the last prompt token ``(B, C)``, and log-probabilities of the next ``(B, V)``."""
    outputs: list[Any] = []
    with observe({attentions(batch.pair.receiver.model)[layer]: lambda _, output: outputs.append(output)}):
        words = batch.first_logits(kv).log_softmax(-1)
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # (B, 1, C), with weights in a tuple
    return output[:, -1].float(), words


def attentions(model: Any) -> list[nn.Module]:
    """Returns the modules that attend to keys and values, one per layer that keeps them."""
    return [
        module
        for module in model.base_model.modules()
        if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")
    ]


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise AnalysisError("expected the package scikit-learn, got none; pip install 'kvfuse[analysis]'") from error
