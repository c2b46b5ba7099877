"""EditConfig: every setting of an editing run, under the field's hparams names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from coachhook_fast.config.gate import GateSettings
from coachhook_fast.config.reading import current_names, read_yaml
from coachhook_fast.config.solve import SolveSettings
from coachhook_fast.config.statistics import StatisticsSettings
from coachhook_fast.config.targets import TargetSettings
from coachhook_fast.model_defaults import default_layers, default_update_weight, later_layers, round_robin_layers

# The published settings (arXiv 2403.05330), with the layers of `default_layers`. λ suits keys of width 6 400 on: a
# small model takes an edit in with a smaller one only.
PAPER: dict[str, Any] = {
    "gate": "sequence",
    "alpha": 2.2,
    "mom2_update_weight": 15_000.0,
    "v_lr": 0.5,
    "v_num_grad_steps": 25,
    "v_loss_threshold": 0.05,
    "clamp_norm_factor": 0.75,
    "context_seeds": ("The", "Therefore", "Because", "I", "You"),
    "subject_templates": (),
    "keep_factor": 0.0,
    "found_paraphrases": 0,
    "found_keep": 0,
    "specific": False,
    "round_robin": 1,
    "other_layers_weight": 1.0,
    "hard_negatives": 0,
    "short_prefixes": 0.0,
    "threshold_relative": False,
    "threshold_whitened": False,
}

# The steps of batches that edit layers in round-robin, where PAPER has those of one that edits all layers.
_ROUND_ROBIN: dict[str, Any] = {
    "other_layers_weight": 0.03,
    "hard_negatives": 8,
    "short_prefixes": 0.2,
    "threshold_relative": True,
    "threshold_whitened": True,
}

# Prompts that are found for a request whose target value is `specific`.
_SPECIFIC: dict[str, Any] = {"found_paraphrases": 3, "found_keep": 12}

# Settings that are None in a config until the model is known.
ROUND_ROBIN_SETTINGS = ("round_robin", *_ROUND_ROBIN)


# Fields stand in the order of the bases, the last first.
@dataclass(frozen=True)
class EditConfig(GateSettings, StatisticsSettings, SolveSettings, TargetSettings):
    """Settings of an editing run; every value is checked when the object is made.

    They come in four groups, which are its bases and say what each is: `TargetSettings` (target values),
    `SolveSettings` (layers and update), `StatisticsSettings` (E[kkᵀ]) and `GateSettings`. The defaults are what
    docs/experiments found best; `EditConfig.paper()` edits as published. Where `layers` are named, or the gate is
    `sequence`, the steps of a batch are the paper's unless `round_robin` and `hard_negatives` say otherwise.

    Raises:
        ValueError, TypeError: a value is out of its range or of the wrong type; the message names field and value.

    Example:
        >>> EditConfig(layers=(4, 5, 6), v_num_grad_steps=20).layers
        (4, 5, 6)
        >>> EditConfig.paper(alpha=2.5).gate
        'sequence'
    """

    def __post_init__(self) -> None:
        self._check_targets()
        self._check_solve()
        self._check_statistics()
        self._check_gate()
        if self.round_robin is not None and self.round_robin > 1 and self.gate != "calibrated":
            raise ValueError(f"round_robin must be 1 where the gate is {self.gate!r}, got {self.round_robin}")

    @classmethod
    def paper(cls, **changes: Any) -> EditConfig:
        """The published settings, `PAPER`, with `changes`."""
        return cls(**{**PAPER, **changes})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EditConfig:
        """Reads settings, by former names too (a FutureWarning says which); unknown names raise ValueError, so that
        a misspelt one cannot pass unnoticed."""
        values = current_names(values)
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown setting(s) {unknown}; EditConfig knows {sorted(known)}")
        return cls(**values)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> EditConfig:
        """Reads settings of an edit set on disk; versions before those of a setting did as the paper."""
        later = (*ROUND_ROBIN_SETTINGS, "specific", *_SPECIFIC)
        return cls.from_dict({**{name: PAPER[name] for name in later}, **current_names(values)})

    @classmethod
    def from_yaml(cls, path: str | Path) -> EditConfig:
        """Reads a YAML file, our own or one of EasyEdit's hparams (its keys without meaning here are passed over)."""
        return cls.from_dict(read_yaml(path))

    def resolved(self, num_layers: int, key_dim: int) -> EditConfig:
        """These settings for a model of `num_layers` blocks with keys of width `key_dim`: none of layers,
        mom2_update_weight, specific and what follows from it, and ROUND_ROBIN_SETTINGS is None. ValueError if
        round_robin exceeds the layers."""
        specific = self.v_lr is None if self.specific is None else self.specific
        found = _SPECIFIC if specific else dict.fromkeys(_SPECIFIC, 0)
        in_turn = (
            self.layers is None and self.gate == "calibrated" if self.round_robin is None else self.round_robin > 1
        )
        layers = self.layers
        if layers is None:
            several = later_layers if specific else round_robin_layers
            layers = several(num_layers, key_dim) if in_turn else default_layers(num_layers)
        groups = self.round_robin or (len(layers) if in_turn else 1)
        steps = _ROUND_ROBIN if groups > 1 else {name: PAPER[name] for name in _ROUND_ROBIN}
        given = {name: getattr(self, name) for name in steps}
        return self.replace(
            layers=tuple(layers),
            round_robin=groups,
            specific=specific,
            **{name: count if getattr(self, name) is None else getattr(self, name) for name, count in found.items()},
            **{name: step if given[name] is None else given[name] for name, step in steps.items()},
            mom2_update_weight=self.mom2_update_weight or default_update_weight(key_dim),
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> EditConfig:
        return dataclasses.replace(self, **changes)
