"""The authors' published format. A pair is a folder:

```
config.json                       the training recipe: the two models, whether tokens were aligned
final/ (or checkpoint-N/)
    projector_config.json         {"0": {"1": {receiver layer: [[sharer layer, projector]]}}}
    projector_<i>.json            {"class": ..., "init_args": {...}}; arguments left out have their class's default
    projector_<i>.pt              a pickled state dict: the weights of one receiver layer, keys and values
```
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvfuse.fusers import Fuser, FuserConfig

RECIPE, MAPPING, WEIGHTS = "config.json", "projector_config.json", "final"
TEMPERATURE = "gate_temperature"  # a buffer in every state dict that inference does not read


@dataclass(frozen=True)
class ProjectorClass:
    """A class of the authors and the kind of fuser that computes the same.

    Attributes:
        name: The authors' class.
        kind: The kind of fuser, a key of :data:`kvfuse.fusers.FUSERS`.
        defaults: Arguments of the class that are options of the fuser, with the defaults of the class.
        required: Arguments for which the fuser knows one value only: that value and the default of the class.
        renamed: Argument -> option, where the two names differ.
        fixed: Options for which the class knows one value only.
        modules: Module of the fuser -> module of the class for a configuration; ``{part}`` stands for ``key`` and
            ``value``.
    """

    name: str
    kind: str
    defaults: dict[str, Any]
    modules: Callable[[Any], dict[str, str]]
    required: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)

    def options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Options of the fuser for arguments of the class. Raises ValueError for an argument it does not support."""
        for name, (value, default) in self.required.items():
            if arguments.get(name, default) != value:
                raise ValueError(f"{name}={arguments.get(name, default)!r}, where only {value!r} can be read")
        return {self.renamed.get(name, name): arguments.get(name, default) for name, default in self.defaults.items()}

    def arguments(self, config: FuserConfig) -> dict[str, Any]:
        """Arguments of the class for a configuration of the fuser."""
        options = {name: getattr(config, self.renamed.get(name, name)) for name in self.defaults}
        return {**options, **{name: value for name, (value, _) in self.required.items()}}

    def lost(self, config: FuserConfig) -> list[str]:
        """Options of the fuser, with their values, that the class cannot hold."""
        given = {name: getattr(config, name) for name in self.fixed}
        return [f"{name}={value!r}" for name, value in given.items() if value != self.fixed[name]]

    def tensors(self, fuser: Fuser, layer: int) -> Iterator[tuple[str, str, int]]:
        """All tensors of one receiver layer: the fuser's parameter, the authors' name of it, and the group in it."""
        modules, num_layers = self.modules(fuser.config), fuser.config.receiver_kv.num_layers
        for parameter, _ in fuser.named_parameters():
            prefix = max((module for module in modules if f"{parameter}.".startswith(f"{module}.")), key=len)
            name = modules[prefix] + parameter.removeprefix(prefix)
            if "{part}" in name:  # a group for the keys of each layer, then one for the values of each
                yield parameter, name.format(part="key"), layer
                yield parameter, name.format(part="value"), num_layers + layer
            else:
                yield parameter, name, layer


def _c2c_modules(config: Any) -> dict[str, str]:
    return {
        "fusion_in": "{part}_in",
        "fusion": "{part}_mlp1.blocks.0",
        **{f"projection.{i}": f"{{part}}_proj_mlp2.blocks.{i}" for i in range(config.num_layers - 2)},
        "projection_out": "{part}_proj_out",
        "weighting": "{part}_scalar_mlp2.blocks.0",
        "weighting_out": "{part}_scalar_head",
        "gate.logit": "{part}_gate_logit",
    }


def _complex_modules(config: Any) -> dict[str, str]:
    stage = 3 if config.dropout > 0 else 2  # each of SwiGLU, norm and dropout, if any, has a number in their list
    last = config.num_layers - 1
    return {
        **{f"translation.{i}.swiglu.gate": f"{{part}}_projection.layers.{stage * i}.gate_proj" for i in range(last)},
        **{f"translation.{i}.swiglu.up": f"{{part}}_projection.layers.{stage * i}.up_proj" for i in range(last)},
        **{f"translation.{i}.norm": f"{{part}}_projection.layers.{stage * i + 1}" for i in range(last)},
        "translation_out": f"{{part}}_projection.layers.{stage * last}",
        "combiner": "{part}_combiner",
        "weighting_in": "weight_hidden.layers.0",
        "weighting_norm": "weight_hidden.layers.1",
        "weighting": "weight_hidden.layers.4",
        "weighting_out": "{part}_weight_head",
        "gate.logit": "gate_logit",
    }


_FIXED = {"rope": "kept", "weights": "full"}
_COMMON = {"dropout": 0.1, "initial_temperature": 1.0}

CLASSES = (
    ProjectorClass(
        name="C2CProjector",
        kind="c2c",
        defaults={
            **_COMMON,
            "hidden_dim": 1024,
            "intermediate_dim": 1024,
            "num_layers": 3,
            "final_temperature": 0.001,
            "zero_init": False,
        },
        modules=_c2c_modules,
        fixed={  # the whole network of the paper, no part left out
            **_FIXED,
            "receiver_input": True,
            "feature_fusion": True,
            "replace": False,
            "weighting": True,
            "parts": "both",
            "gate": "layer",
        },
    ),
    ProjectorClass(
        name="AllInOneProjector",
        kind="c2c-complex",
        defaults={
            **_COMMON,
            "hidden_dim": 512,
            "weight_hidden_dim": 1024,
            "num_layers": 2,
            "scalar_temperature": 0.005,
            "final_temperature": 0.01,
        },
        modules=_complex_modules,
        required={
            "use_swiglu": (True, False),
            "use_concat": (True, False),
            "use_layer_norm": (True, True),
            "use_residual": (True, True),
            "add_self": (True, True),
            "preserve_target_weight": (False, True),
            "gate_granularity": ("scalar", "scalar"),
            "gate_depends_on_input": (False, False),
            "weight_granularity": ("head_merged", "scalar"),
            "weight_depends_on_input": (True, False),
            "weight_input_features": ("target_projected_key", "target_key"),
        },
        renamed={"scalar_temperature": "weight_temperature"},
        fixed=_FIXED,
    ),
)
