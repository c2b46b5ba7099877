"""EditConfig: every setting of an editing run, under the field's hparams names."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from coachhook_fast import files
from coachhook_fast.model_defaults import default_layers, default_update_weight, later_layers, round_robin_layers

GATES = ("calibrated", "sequence")
THRESHOLD_RULES = ("edit_keys", "zscore", "fpr")

# Most tokens in a pass of the editor, without a setting; on a GPU the first pass has as many, and shows what a token
# takes (models/passes/budget.py).
START_TOKENS = 8192

# Names of earlier versions, which edit sets, YAML files and --set may still have.
_FORMER_NAMES = {
    "layer_turns": "round_robin",
    "others_weight": "other_layers_weight",
    "namesakes": "hard_negatives",
    "namesake_tokens": "hard_negative_tokens",
    "openings": "short_prefixes",
    "threshold_own": "threshold_edit_share",
}
_FORMER_RULES = {"own_keys": "edit_keys"}

# Keys of EasyEdit's YAML files that say something this package finds out itself or has no use for.
_EASYEDIT_ONLY = {
    "alg_name", "model_name", "stats_dir", "device", "model_parallel", "max_length", "batch_size", "fp16",
    "layer_selection", "v_loss_layer", "fact_token", "mlp_module_tmp", "attn_module_tmp", "ln_f_module",
    "lm_head_module", "mom2_adjustment", "mom2_dataset", "mom2_n_samples", "mom2_dtype", "objective_optimization",
}  # fmt: skip

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")

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


@dataclass(frozen=True)
class EditConfig:
    """Settings of an editing run; every value is checked when the object is made.

    The defaults are what docs/experiments found best; `EditConfig(**PAPER)` edits as published. Where `layers` are
    named, or the gate is `sequence`, the steps of a batch are the paper's unless `round_robin` and `hard_negatives` say
    otherwise.

    Args:
        layers: edited blocks, ascending; None takes `round_robin_layers` of the model in round-robin, else
            `default_layers`.
        round_robin: each batch edits every `round_robin`-th of `layers`, those with the fewest edits, and the others
            only learn something of its keys. 1, as in the paper, edits all; len(layers) one at a time.
            `calibrated` only (docs/experiments/round-robin.md). None: one at a time where `layers` is None and the gate
            is `calibrated`, else 1.
        other_layers_weight: how much of K Kᵀ a layer learns of the requests that others edit. In full, a thousand keys
            leave a new one no room in 1 536 dimensions; without, later updates change what the layer answers to them
            (docs/experiments/interfering-keys.md). None: .03 where `round_robin` is above 1.
        hard_negatives: most texts of the corpus a request in which another subject ends in the same token: their keys
            enter the batch's solve without a residual, so that the edit passes them by
            (docs/experiments/hard-negatives.md). None: 8 where `round_robin` is above 1, else 0, as in the paper.
        short_prefixes: share of the key statistics' tokens that are beginnings of texts, cut out of the corpus; they
            come on top of the token budget (docs/experiments/interfering-keys.md). None: .2 where `round_robin` is
            above 1, else 0.
        hard_negative_tokens: tokens of the corpus kept to find them in.
        specific: target values by normalised descent instead of Adam, with further steps for targets that are not said,
            in later blocks (`later_layers`), inserted whole: edits change one fact and leave the rest of their subject
            alone (docs/experiments/specificity.md). None: unless `v_lr` is given; the paper's is False.
        v_lr: Adam's learning rate for the target values; None takes one a request (editing/targets/optimise.py). Not
            for `specific` ones.
        v_num_grad_steps: steps for a target value; at most four times as many for a `specific` one that is not said.
        v_weight_decay: weight of ||δ|| / ||v0||².
        v_loss_threshold: a request whose loss is below it stops.
        clamp_norm_factor: bound on ||δ|| / ||v0||.
        kl_factor: weight of KL(p0 || pδ) at the subject's last token of "{subject} is a".
        keep_factor: weight of KL(p0 || pδ) at the end of the prompts to keep, those of a request and those that are
            found, mean over them.
        found_paraphrases: a request with fewer paraphrases of its own gets so many from those that are known of its
            question (editing/targets/wordings.py); found_keep: prompts to keep that are found for every request. None:
            3 and 12 where edits are `specific`, else none.
        continuation_factor: weight of KL(p0 || pδ) at the target's last token after the bare prompt: the text goes on
            as it would have instead of repeating the target. It costs reliability where targets are long
            (docs/experiments/drift.md), so it is off, as in the paper.
        mom2_update_weight: λ of C = λ E[kkᵀ] + Σ KKᵀ; None takes `default_update_weight` (docs/experiments/lambda.md).
        mom2_n_tokens: token budget of the key statistics; None takes 20 d, or 10 d of the model's own text.
        mom2_tolerance: stop the statistics before the budget, once the estimated relative error of C⁻¹k is below it.
        stats_sequence_length: tokens a packed row of the statistics pass, capped by the model's context.
        gate: "calibrated" or "sequence".
        alpha: the `sequence` gate's first threshold α; it never rises.
        threshold_rule: "edit_keys", "zscore" or "fpr", how `calibrated` finds τ (see editing/calibration.py and
            docs/experiments/gates.md).
        threshold_relative: τ is compared with ||Δk|| / ||k|| and not with ||Δk||: tokens that an earlier layer has
            edited have long keys and would answer to later layers too (docs/experiments/relative-threshold.md).
            `calibrated` only. None: where `round_robin` is above 1; the paper's is False.
        threshold_whitened: ||Δk|| is measured against how ordinary text spreads along each of Δ's directions
            (edits/whitening.py, docs/experiments/whitening.md). `calibrated` only. None: where `round_robin` is above
            1; the paper's is False.
        threshold_edit_share: for "edit_keys", where τ lies between ordinary text (0) and the edit keys (1).
        threshold_z: standard deviations above the mean for "zscore"; "edit_keys" takes at least as many, as far as that
            is not over .85 of the way, and at most three times as many.
        threshold_fpr: share of ordinary tokens that may pass for "fpr", and at most for "edit_keys".
        threshold_keys: ordinary keys kept a layer to find τ.
        context_seeds: beginnings from which the model writes the context texts.
        context_tokens: tokens generated after each beginning.
        subject_templates: further contexts, texts with one slot `{}` for the subject in the place of the prompt; () is
            the paper's way (docs/experiments/generality.md).
        max_batch_tokens: most tokens in one pass of the editor; bounds its memory. None: 8 192; for target values on a
            GPU, as many as its free memory is seen to hold.
        layer_module_tmp: template of a block's name, for architectures this package does not know.
        rewrite_module_tmp: template of its down-projection's name.

    Raises:
        ValueError, TypeError: a value is out of its range or of the wrong type; the message names field and value.
    """

    layers: tuple[int, ...] | None = None
    round_robin: int | None = None
    other_layers_weight: float | None = None
    hard_negatives: int | None = None
    short_prefixes: float | None = None
    hard_negative_tokens: int = 1_000_000
    specific: bool | None = None
    v_lr: float | None = None
    v_num_grad_steps: int = 15
    v_weight_decay: float = 0.5
    v_loss_threshold: float = 0.02
    clamp_norm_factor: float = 3.0
    kl_factor: float = 0.0625
    keep_factor: float = 6.0
    found_paraphrases: int | None = None
    found_keep: int | None = None
    continuation_factor: float = 0.0
    mom2_update_weight: float | None = None
    mom2_n_tokens: int | None = None
    mom2_tolerance: float | None = None
    stats_sequence_length: int = 512
    gate: str = "calibrated"
    alpha: float = 2.2
    threshold_rule: str = "edit_keys"
    threshold_relative: bool | None = None
    threshold_whitened: bool | None = None
    threshold_edit_share: float = 0.75
    threshold_z: float = 8.0
    threshold_fpr: float = 3e-3
    threshold_keys: int = 4096
    context_seeds: tuple[str, ...] = ("The",)
    context_tokens: int = 10
    subject_templates: tuple[str, ...] = ()
    max_batch_tokens: int | None = None
    layer_module_tmp: str | None = None
    rewrite_module_tmp: str | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "context_seeds", "subject_templates"):  # lists come from YAML and JSON
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            value = getattr(self, name)
            if not isinstance(value, tuple) and not (name == "layers" and value is None):
                raise TypeError(f"{name} must be a list, got {value!r}")
        if self.layers is not None:
            if not self.layers or not all(type(layer) is int and layer >= 0 for layer in self.layers):
                raise ValueError(f"layers must be one or more block numbers >= 0, got {self.layers}")
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be ascending without repeats, got {self.layers}")
        for name in ("clamp_norm_factor", "alpha", "threshold_edit_share", "threshold_z", "threshold_fpr"):
            _check_number(name, getattr(self, name), above=0.0)
        for name in ("v_weight_decay", "v_loss_threshold", "kl_factor", "keep_factor", "continuation_factor"):
            _check_number(name, getattr(self, name), least=0.0)
        for name in ("found_paraphrases", "found_keep"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), least=0, integer=True)
        _check_number("v_num_grad_steps", self.v_num_grad_steps, least=1, integer=True)
        if self.max_batch_tokens is not None:
            _check_number("max_batch_tokens", self.max_batch_tokens, least=1, integer=True)
        if self.round_robin is not None:
            _check_number("round_robin", self.round_robin, least=1, integer=True)
            if self.round_robin > 1 and self.gate != "calibrated":
                raise ValueError(f"round_robin must be 1 where the gate is {self.gate!r}, got {self.round_robin}")
            if self.layers is not None and self.round_robin > len(self.layers):
                raise ValueError(
                    f"round_robin must be at most the number of layers {self.layers}, got {self.round_robin}"
                )
        if self.specific and self.v_lr is not None:
            raise ValueError(f"v_lr is Adam's rate, which specific edits have no use for, got {self.v_lr}")
        for name in ("specific", "threshold_relative", "threshold_whitened"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise TypeError(f"{name} must be true, false or null, got {getattr(self, name)!r}")
            if name.startswith("threshold") and getattr(self, name) and self.gate != "calibrated":
                raise ValueError(f"{name} must be false where the gate is {self.gate!r}, got true")
        if self.other_layers_weight is not None:
            _check_number("other_layers_weight", self.other_layers_weight, above=0.0)
            if self.other_layers_weight > 1:
                raise ValueError(f"other_layers_weight must be at most 1, got {self.other_layers_weight}")
        if self.hard_negatives is not None:
            _check_number("hard_negatives", self.hard_negatives, least=0, integer=True)
        if self.short_prefixes is not None:
            _check_number("short_prefixes", self.short_prefixes, least=0.0)
            if self.short_prefixes >= 1:
                raise ValueError(f"short_prefixes must be a share under 1, got {self.short_prefixes}")
        _check_number("hard_negative_tokens", self.hard_negative_tokens, least=0, integer=True)
        _check_number("stats_sequence_length", self.stats_sequence_length, least=2, integer=True)  # BOS and a token
        _check_number("threshold_keys", self.threshold_keys, least=2, integer=True)
        _check_number("context_tokens", self.context_tokens, least=1, integer=True)
        for name in ("v_lr", "mom2_update_weight"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=0.0)
        if self.mom2_tolerance is not None:
            _check_number("mom2_tolerance", self.mom2_tolerance, above=0.0)
        if self.mom2_n_tokens is not None:
            _check_number("mom2_n_tokens", self.mom2_n_tokens, least=1, integer=True)
        if self.threshold_edit_share > 1:
            raise ValueError(f"threshold_edit_share must be a share of at most 1, got {self.threshold_edit_share}")
        if self.threshold_fpr >= 1:
            raise ValueError(f"threshold_fpr must be a share under 1, got {self.threshold_fpr}")
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.gate!r}")
        if self.threshold_rule not in THRESHOLD_RULES:
            raise ValueError(f"threshold_rule must be one of {THRESHOLD_RULES}, got {self.threshold_rule!r}")
        if not all(isinstance(seed, str) and seed for seed in self.context_seeds):
            raise ValueError(f"context_seeds must be non-empty strings, got {self.context_seeds}")
        if not all(isinstance(text, str) and text.count("{}") == 1 for text in self.subject_templates):
            raise ValueError(f"subject_templates must be texts with one slot '{{}}' each, got {self.subject_templates}")

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

    def calibrates_otherwise(self, other: EditConfig) -> bool:
        """Whether τ of the `calibrated` gate is found by another rule than with `other`."""
        rule = ("threshold_rule", "threshold_edit_share", "threshold_z", "threshold_fpr")
        return self.gate == "calibrated" and any(getattr(self, name) != getattr(other, name) for name in rule)

    @property
    def pass_tokens(self) -> int:
        """Most tokens in a pass that is not differentiated."""
        return self.max_batch_tokens or START_TOKENS

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> EditConfig:
        return dataclasses.replace(self, **changes)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The settings that a YAML file names, less those of EasyEdit's that have no meaning here."""
    return settings_in(yaml_mapping(path))


def settings_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a YAML file's `values` that are settings, by their names of today."""
    return current_names({key: number_in(value) for key, value in values.items() if key not in _EASYEDIT_ONLY})


def yaml_mapping(path: str | Path) -> dict[str, Any]:
    """All that a YAML file says. ValueError where it is no YAML, or no mapping."""
    try:
        values = yaml.safe_load(files.read_text(Path(path), most=files.MOST_SETTINGS))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def current_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with settings of earlier versions under the names that they have now, and one FutureWarning of all.

    Raises:
        ValueError: a setting is there under both names.
    """
    found = {old: new for old, new in _FORMER_NAMES.items() if old in values}
    if both := [f"{old} and {new}" for old, new in found.items() if new in values]:
        raise ValueError(f"one setting under two names, take the second: {', '.join(both)}")
    named = {found.get(name, name): value for name, value in values.items()}
    changed = [f"{old} is {new} now" for old, new in found.items()]
    rule = named.get("threshold_rule")
    if isinstance(rule, str) and rule in _FORMER_RULES:
        named["threshold_rule"] = _FORMER_RULES[rule]
        changed.append(f"threshold_rule {rule!r} is {_FORMER_RULES[rule]!r} now")
    if changed:
        warnings.warn(f"settings by former names: {', '.join(changed)}", FutureWarning, stacklevel=3)
    return named


def number_in(value: Any) -> Any:
    """YAML's `value`, where 5e-1 and 1.5e3, as EasyEdit's files write numbers, are numbers and not text."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def _check_number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, integer: bool = False
) -> None:
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{name} must be {'an integer' if integer else 'a number'}, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be above {above}, got {value}")
