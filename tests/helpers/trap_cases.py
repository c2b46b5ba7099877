"""Cases of the trap tests: hooks and tiny models with random edits, and editors of tiny models."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer, watched
from torch import Tensor, nn

from coachhook_fast import EditConfig, Editor, EditRequest
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.models.architectures import layout_of

GATES = ("calibrated", "sequence")
LAYERS = (1, 2)
TEXTS = [tiny_texts(20)[i] for i in (0, 3, 5, 8)]  # of different lengths


def random_delta(m: int, d: int, *, rank: int = 3, scale: float = 0.1, seed: int = 0) -> LowRankDelta:
    """scale * (a random matrix of `rank`), fp64."""
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    X = torch.randn(d, rank, generator=generator, dtype=torch.float64)
    return LowRankDelta.zeros(m, d, dtype=torch.float64).append(scale * R, X)


def hook_layer(gate: str, threshold: float, *, dtype: torch.dtype = torch.float64) -> HookLinear:
    """A hook around a random 13 -> 11 projection."""
    torch.manual_seed(0)
    hook = HookLinear(nn.Linear(13, 11, dtype=dtype), gate=gate)
    hook.set_delta(random_delta(11, 13), threshold)
    return hook


def key_of_norm(hook: HookLinear, norm: float) -> Tensor:
    """A key [d] with ||Δk|| = norm."""
    key = hook.get_delta_weight()[0].double()
    return key * (norm / (hook.get_delta_weight().double() @ key).norm())


def hooked_model(gate: str, *, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random edits in two layers, at which about a third of all tokens fire."""
    model = tiny_model(family, dtype=dtype)
    hooks = Hooks(model, layout_of(model), LAYERS, gate)
    tokenizer = tiny_tokenizer()
    for position, hook in enumerate(hooks.hooks):
        delta = random_delta(hook.out_features, hook.in_features, seed=position)
        hook.set_delta(delta, 0.5)
        if gate == "calibrated":
            with watched(model) as seen, torch.no_grad():
                for text in TEXTS:
                    model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
            norms = torch.cat([trace.norm.flatten() for trace in seen[position]])
            hook.set_delta(delta, float(norms.quantile(0.66)))
    return model


def logits_of(model: Any, text: str) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tiny_tokenizer()(text).input_ids]), use_cache=False).logits[0]


def editor_for(gate: str, *, dtype: torch.dtype = torch.float32, family: str = "llama", **changes: Any) -> Editor:
    """An editor of a tiny model with its statistics collected."""
    settings = {
        "layers": LAYERS,
        "v_num_grad_steps": 3,
        "mom2_update_weight": 10.0,
        "threshold_rule": "zscore",
        "threshold_z": 1.0,
    }
    config = EditConfig(gate=gate, **{**settings, **changes})
    editor = Editor(tiny_model(family, dtype=dtype), tiny_tokenizer(), config)
    editor.collect_statistics(tiny_texts(), progress=False)
    return editor


def requests(n: int, *, seed: int = 0) -> list[EditRequest]:
    return [EditRequest(**fact) for fact in tiny_facts(n, seed=seed)]
