"""Can one model's cache be mapped into the other's, and how much of the target's space does the map reach?

The transformation oracle (paper, 3.2): a multilayer perceptron of three layers learns, from the sharer's keys and values of a token in
one layer, those of the receiver, by mean squared error; ridge regression (:mod:`kvfuse.fusers.normal_equations`) beside it. Prompts are split, not
tokens. Two figures say where the mapped tokens lie: ``inside`` is the share of them within the balls around the target's tokens that
reach to their k-th nearest neighbours (precision: Kynkäänniemi et al. 2019), ``reached`` the share of these balls that hold a mapped
token (coverage: Naeem et al. 2020). The other half of the target itself shows what can be expected of either.

Quality is told by what the receiver wants to say when the mapped layer stands in place of its own: the divergence of its first-token
distribution. Whether the cosine of that layer's attention output, or the error of the map, predicts it is told by rank correlations
over maps of all stages of training.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kvfuse.analysis.finding import Finding
from kvfuse.analysis.hooks import watching
from kvfuse.analysis.maps import NEIGHBOURS, Map, Standard, coverage, mean, perceptrons, ridge
from kvfuse.analysis.readout import Read, batches, first_run, read, spread
from kvfuse.analysis.study import Study
from kvfuse.cache.kv import KV
from kvfuse.errors import AnalysisError
from kvfuse.stages.fuse import SelectedTokens
from kvfuse.support.plots import COLOURS, MARKERS, legend_above, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOUDS = ("sharer", "receiver", "mapped")
STAGES = (0, 20, 60, 150, 400, 1000)
PREDICTORS = {"attention_cosine": "cosine of attention outputs", "validation_mse": "error of the map (MSE)"}


class Tokens:
    """One layer's keys and values, side by side, of the aligned tokens of both models.

    Args:
        study: The pair.
        questions: What it reads.
        layer: The receiver's layer; the sharer's is the one that the fuser reads for it.
    """

    def __init__(self, study: Study, questions: Sequence[Any], layer: int) -> None:
        self.pair, self.layer = study.pair, layer
        self.reads: list[Read] = []
        self.picked: list[SelectedTokens] = []
        source = study.pair.fusers[0].sharer_layers[layer]
        rows: list[tuple[Tensor, Tensor]] = []
        for batch in batches(questions, study.batch_size):
            seen = read(study.pair, batch)
            like = torch.empty(0, device=seen.own.key.device)
            picked = study.pair.fuser_inputs(seen.prompt, like=like, receiver=seen.own)
            if picked is None:
                continue
            self.reads.append(seen)
            self.picked.append(picked)
            rows.append((flat(picked.sharer, source), flat(picked.receiver, layer)))
        if not rows:
            raise AnalysisError("expected prompts with tokens that both models share, got none; use other data")
        self.sharer, self.receiver = (torch.cat(parts) for parts in zip(*rows, strict=True))
        self.counts = [len(mine) for _, mine in rows]

    def mapped(self, run: Map) -> list[KV]:
        """For each batch the receiver's cache with the mapped layer in place of its own, at the aligned tokens."""
        return [
            self._replace(*one)
            for one in zip(self.reads, self.picked, run(self.sharer).split(self.counts), strict=True)
        ]

    def _replace(self, seen: Read, picked: SelectedTokens, mapped: Tensor) -> KV:
        residual = picked.receiver.zeros_like()
        _, _, heads, _, key_dim = residual.key.shape
        parts = mapped.split([heads * key_dim, heads * residual.value.shape[-1]], dim=1)
        for part, own, its in zip(
            (residual.key, residual.value), (picked.receiver.key, picked.receiver.value), parts, strict=True
        ):
            part[self.layer, 0] = its.unflatten(1, (heads, -1)).transpose(0, 1).to(part) - own[self.layer, 0]
        return seen.own.add_tokens(
            picked.rows, picked.positions, residual if picked.rope is None else picked.rope.apply(residual)
        )


def run(
    study: Study, layer: int = -1, questions: int = 160, hidden: int = 256, samples: int = 300, perplexity: float = 50
) -> Finding:
    """Fit both maps and see where they lead.

    Args:
        study: A pair with prompts; answers are not needed.
        layer: The receiver's; by default its last, as in the paper.
        questions: How many to read; a quarter of them validates.
        hidden: Width of the perceptron.
        samples: Validation tokens to draw and to measure neighbours among.
        perplexity: Of t-SNE, at most a third of the samples.

    Raises:
        AnalysisError: There is no such layer, too few prompts, or scikit-learn is missing.
    """
    _require_sklearn()
    layers = study.pair.receiver.kv_spec.num_layers
    if not -layers <= layer < layers:
        raise AnalysisError(f"expected layer from {-layers} to {layers - 1}, got {layer}; choose one of the receiver's")
    asked = spread(study, questions)
    if len(asked) < 2:
        raise AnalysisError(f"expected two prompts or more, got {len(asked)}; give more data")
    held = {place for place in range(len(asked)) if place % 4 == 1}
    with torch.no_grad():
        training, validation = (
            Tokens(study, [one for place, one in enumerate(asked) if (place in held) == wanted], layer % layers)
            for wanted in (False, True)
        )
    stages = [stage for stage in STAGES if not study.smoke or stage <= 60]
    maps = {"mean": mean(training.receiver), "ridge": ridge(training.sharer, training.receiver)}
    maps |= {
        f"mlp, {stage} steps": one
        for stage, one in zip(
            stages, perceptrons(training.sharer, training.receiver, hidden, stages, study.seed), strict=True
        )
    }
    with torch.no_grad():
        quality = {
            name: {**_errors(one, training, validation), **_quality(study, one, validation)}
            for name, one in maps.items()
        }
        best = maps[f"mlp, {stages[-1]} steps"]
        clouds, volume = picture(validation, best, samples, perplexity, study.seed)
    figures = {
        "layer": layer % layers,
        "prompts": {"training": len(asked) - len(held), "validation": len(held)},
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
    tokens: Tokens, run: Map, samples: int, perplexity: float, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The clouds of :data:`CLOUDS` in two dimensions, by PCA and by t-SNE, and how much of the receiver's the mapped one fills.

    Where the two models' sizes differ, the sharer's tokens are shown by as many of their own principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    order = np.random.default_rng(seed).permutation(len(tokens.sharer))
    chosen, others = order[:samples], order[samples : 2 * samples]
    standard = Standard(tokens.receiver)
    target, mapped = (standard.to(part).cpu().numpy() for part in (tokens.receiver, run(tokens.sharer)))
    volume = {"mapped": coverage(target[chosen], mapped[chosen])}
    if len(others) > NEIGHBOURS:
        volume["target's other half"] = coverage(target[chosen], target[others])
    width = min(target.shape[1], tokens.sharer.shape[1], len(chosen))
    source = Standard(tokens.sharer).to(tokens.sharer).cpu().numpy()[chosen]
    parts = [source, target[chosen], mapped[chosen]]
    if source.shape[1] != target.shape[1]:
        space = PCA(width, random_state=seed).fit(target[chosen])
        parts = [PCA(width, random_state=seed).fit_transform(source), *(space.transform(part) for part in parts[1:])]
    points = np.concatenate(parts)
    spread_out = TSNE(perplexity=min(perplexity, len(points) / 4), max_iter=1000, init="pca", random_state=seed)
    planes = {"PCA": PCA(2, random_state=seed).fit_transform(points), "t-SNE": spread_out.fit_transform(points)}
    split = {name: np.split(plane, 3) for name, plane in planes.items()}
    return {
        name: {cloud: np.round(one, 3).tolist() for cloud, one in zip(CLOUDS, parts, strict=True)}
        for name, parts in split.items()
    }, volume


def predictors(maps: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Spearman's rank correlation of the divergence with the error and with the cosine, over maps."""
    from scipy.stats import spearmanr

    out = {}
    for name in PREDICTORS:
        one = spearmanr([row[name] for row in maps], [row["divergence"] for row in maps]).statistic
        out[name] = None if np.isnan(one) else float(one)
    return out


def reading(figures: dict[str, Any]) -> str:
    """Two sentences."""
    maps, volume = figures["maps"], figures["volume"]
    last = list(maps)[-1]
    half = volume.get("target's other half")
    ceiling = f" (the target's own other half: {100 * half['reached']:.0f}%)" if half else ""
    return (
        f"On prompts held out, ridge explains {100 * maps['ridge']['validation_r2']:.0f}% and the perceptron "
        f"{100 * maps[last]['validation_r2']:.0f}% of the variance of the receiver's layer {figures['layer']}; "
        f"{100 * volume['mapped']['inside']:.0f}% of the mapped tokens lie inside of its space and reach "
        f"{100 * volume['mapped']['reached']:.0f}% of it{ceiling}. "
        f"With this layer mapped, what the receiver says first departs by {maps[last]['divergence']:.3f} nats from its own (the mean in "
        f"its place: {maps['mean']['divergence']:.3f}); over {len(maps)} maps that has a rank correlation of "
        f"{_signed(figures['predictors']['attention_cosine'])} with the cosine of attention outputs and of "
        f"{_signed(figures['predictors']['validation_mse'])} with the error."
    )


@styled
def draw(figures: dict[str, Any]) -> "Figure":
    """Three clouds by PCA and by t-SNE; below, what predicts how far the receiver's words depart."""
    figure, panels = new_panels(7.4, 2, 2)
    shown: list[Any] = []
    for axes, (name, clouds) in zip(panels[:2], figures["clouds"].items(), strict=True):
        points = [_cloud(axes, cloud, place, clouds[cloud]) for place, cloud in enumerate(CLOUDS)]
        shown = shown or points
        axes.set_title(name, loc="left", fontsize=9)
        axes.set(xlabel="first dimension (no unit)", ylabel="second dimension" if axes is panels[0] else "")
    for axes, (field, label) in zip(panels[2:], PREDICTORS.items(), strict=True):
        _draw_maps(axes, figures["maps"], field)
        axes.set(
            xlabel=label, ylabel="divergence of the first token (nats)" if axes is panels[2] else "", ylim=(0, None)
        )
        axes.margins(0.2, 0.15)
    panels[3].legend(loc="lower right")
    legend_above(figure, shown)
    return figure


def _draw_maps(axes: "Axes", maps: dict[str, dict[str, float]], field: str) -> None:
    """The perceptron's stages in their order, the first and the last named, and the other maps."""
    stages = {name.removeprefix("mlp, "): one for name, one in maps.items() if name.startswith("mlp")}
    groups = [
        ("perceptron while trained", list(stages.values())),
        *((name, [maps[name]]) for name in ("mean", "ridge")),
    ]
    for place, (name, some) in enumerate(groups, start=2):
        x, y = [one[field] for one in some], [one["divergence"] for one in some]
        axes.plot(x, y, MARKERS[place], linestyle="-", color=COLOURS[place], markersize=7, linewidth=0.8, label=name)
    for name in (next(iter(stages)), list(stages)[-1]):
        axes.annotate(
            name, (stages[name][field], stages[name]["divergence"]), (6, -13), textcoords="offset points", fontsize=8
        )


def _cloud(axes: "Axes", name: str, place: int, points: list[list[float]]) -> Any:
    x, y = np.array(points).T
    return axes.plot(
        x,
        y,
        MARKERS[place],
        color=COLOURS[place],
        markersize=3.5,
        alpha=0.7,
        markeredgewidth=0,
        linestyle="",
        label=name,
    )[0]


def _errors(run: Map, training: Tokens, validation: Tokens) -> dict[str, float]:
    errors = {"training_mse": training, "validation_mse": validation}
    out = {name: nn.functional.mse_loss(run(one.sharer), one.receiver).item() for name, one in errors.items()}
    baseline = nn.functional.mse_loss(mean(training.receiver)(validation.receiver), validation.receiver).item()
    return {**out, "validation_r2": 1 - out["validation_mse"] / baseline}


def _quality(study: Study, run: Map, tokens: Tokens) -> dict[str, float]:
    """Mean cosine of the layer's attention output, and mean divergence KL(own || mapped) of the first token, over prompts."""
    model, cosines, divergences = study.pair.receiver.model, [], []
    for seen, kv in zip(tokens.reads, tokens.mapped(run), strict=True):
        (own, words), (other, others) = (_attend(model, seen, one, tokens.layer) for one in (seen.own, kv))
        cosines.append(nn.functional.cosine_similarity(own, other, dim=-1))
        divergences.append((words.exp() * (words - others)).sum(-1))
    means = [float(torch.cat(parts).mean()) for parts in (cosines, divergences)]
    return dict(zip(("attention_cosine", "divergence"), means, strict=True))


def _attend(model: Any, seen: Read, kv: KV, layer: int) -> tuple[Tensor, Tensor]:
    """What a layer's attention gives for the last prompt token ``(B, C)``, and the log-probabilities of the first token ``(B, V)``."""
    heard: list[Tensor] = []
    module = attentions(model)[layer]
    with watching({module: lambda _, out: heard.append((out[0] if isinstance(out, tuple) else out)[:, -1].float())}):
        logits = first_run(model, seen, kv).logits[:, -1].float()
    return heard[0], logits.log_softmax(-1)


def attentions(model: Any) -> list[nn.Module]:
    """The modules that attend to keys and values, one per layer that keeps them."""
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


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"
