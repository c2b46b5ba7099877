"""Settings as files and --set write them: YAML, EasyEdit's hparams, names of earlier versions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from coachhook_fast import files

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
