"""Bounds on what settings may ask for, from a stranger's edit set or by a slip: far above any use, far below a hang."""

from __future__ import annotations

from typing import Any

MOST_LAYERS = 10_000
MOST_CONTEXT_TOKENS = 1_000
MOST_CONTEXTS = 1_000
MOST_STEPS = 100_000


def check_bounds(config: Any) -> None:
    """ValueError where a setting of an `EditConfig` is out of bounds, or a module template is none."""
    if config.layers is not None and config.layers[-1] >= MOST_LAYERS:
        raise ValueError(f"layers must be under {MOST_LAYERS}, got {config.layers[-1]}")
    for name, most in (("context_tokens", MOST_CONTEXT_TOKENS), ("v_num_grad_steps", MOST_STEPS)):
        if getattr(config, name) > most:
            raise ValueError(f"{name} must be at most {most}, got {getattr(config, name)}")
    for name in ("context_seeds", "subject_templates"):
        if len(getattr(config, name)) > MOST_CONTEXTS:
            raise ValueError(f"{name} may hold {MOST_CONTEXTS} texts, got {len(getattr(config, name))}")
    for name in ("layer_module_tmp", "rewrite_module_tmp"):
        check_template(name, getattr(config, name))


def check_template(name: str, template: object) -> None:
    """ValueError unless `template` is None or a module's name with one `{}` for the block and no other brace: a format
    string can ask for more than a number."""
    if template is None:
        return
    if not isinstance(template, str) or template.count("{}") != 1 or any(c in template.replace("{}", "") for c in "{}"):
        raise ValueError(f"{name} must be a module's name with one {{}} for the block's number, got {template!r}")
