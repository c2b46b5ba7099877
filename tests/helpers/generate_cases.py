"""What the tests of generate() share: an edited tiny model, and the tokens of the plain rule.

`PlainHook` is the gate's definition, a loop over tokens, in a model that keeps no cache. Under `sequence` it knows how
long the prompt is: prompt tokens are judged together, each later one against all tokens up to itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny import tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor, nn

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.models.architectures import layout_of

GATES = ("calibrated", "relative", "sequence")  # "relative": calibrated, with τ compared with ‖Δk‖ / ‖k‖
LAYERS = (1, 2)
STEPS = 12
TEXTS = [tiny_texts(20)[i] for i in (0, 3, 5, 8)]  # of different lengths
ALPHA = 0.8


class PlainHook(nn.Module):
    """The gated projection by its definition, without a cache: one sequence, or rows of one length."""

    def __init__(self, hook: HookLinear) -> None:
        super().__init__()
        self.base = hook.base
        self.delta = hook.get_delta_weight()
        self.gate, self.threshold, self.relative = hook.gate, hook.threshold, hook.served.state.relative
        self.prompt_length: int | None = None  # None: judge all tokens together

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        edit = x @ self.delta.T
        norm = edit.norm(dim=-1)
        if self.gate == "calibrated":
            fire = (norm / x.norm(dim=-1) if self.relative else norm) >= self.threshold
        else:
            length = x.shape[1]
            prompt = length if self.prompt_length is None else min(self.prompt_length, length)
            fire = torch.zeros_like(norm, dtype=torch.bool)
            for row in range(x.shape[0]):
                for token in range(length):
                    seen = norm[row, : max(prompt, token + 1)]
                    fire[row, token] = (norm[row, token] - seen.mean()) / seen.std() >= self.threshold
        return torch.where(fire[..., None], out + edit, out)


def hooked(gate: str, family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with random edits in two layers, strong enough to change what it writes."""
    model = tiny_model(family, seed=seed, dtype=dtype)
    model.generation_config.eos_token_id = None  # all sequences run to the same length
    relative = gate == "relative"
    hooks = Hooks(model, layout_of(model), LAYERS, "sequence" if gate == "sequence" else "calibrated")
    generator = torch.Generator().manual_seed(seed)
    for hook in hooks.hooks:
        m, d = hook.out_features, hook.in_features
        R = 0.3 * torch.randn(m, 3, generator=generator, dtype=torch.float64)
        X = torch.randn(d, 3, generator=generator, dtype=torch.float64)
        delta = LowRankDelta.zeros(m, d, dtype=torch.float64).append(R, X)
        hook.set_delta(delta, ALPHA, relative=relative)
        if gate != "sequence":
            seen: list[Tensor] = []
            handle = hook.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            with torch.no_grad():
                for text in TEXTS:
                    model(ids_of(text), use_cache=False)
            handle.remove()
            norms = torch.cat([hook.trace(keys).norm.flatten() for keys in seen]).sort().values
            middle = norms[len(norms) // 2 : -len(norms) // 8]
            gap = int((middle[1:] - middle[:-1]).argmax())  # no norm lies near the threshold: rounding flips nothing
            hook.set_delta(delta, float(middle[gap : gap + 2].mean()), relative=relative)
    return model


def plain(model: Any) -> Any:
    """The same model with `PlainHook`s."""
    copied = copy.deepcopy(model)
    hooks = [PlainHook(hook) for hook in copied.coachhook.hooks]
    layers = copied.coachhook.layers
    copied.coachhook.unload()
    for layer, hook in zip(layers, hooks, strict=True):
        parent, _, name = layout_of(copied).rewrite_module_tmp.format(layer).rpartition(".")
        setattr(copied.get_submodule(parent), name, hook)
    return copied


def ids_of(text: str) -> Tensor:
    return torch.tensor([tiny_tokenizer()(text).input_ids])


def set_prompt(model: Any, length: int | None) -> None:
    for module in model.modules():
        if isinstance(module, PlainHook):
            module.prompt_length = length


@torch.no_grad()
def reference(model: Any, ids: Tensor, steps: int = STEPS, *, prompt: int | None = -1) -> list[int]:
    """Greedy tokens of the plain model, one whole pass a token. prompt: tokens judged together, -1 all of `ids`."""
    twin = plain(model)
    set_prompt(twin, ids.shape[1] if prompt == -1 else prompt)
    for _ in range(steps):
        logits = twin(ids, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().reshape(1, 1)], dim=1)
    return ids[0, -steps:].tolist()


def generate(model: Any, ids: Tensor, steps: int = STEPS, **options: Any) -> list[int]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": steps, "do_sample": False, **options}
    made = model.generate(ids, **options)
    return made[0, -steps:].tolist()


def fired(model: Any, ids: Tensor) -> bool:
    """Whether the edits change what the model writes."""
    with model.coachhook.disabled():
        base = generate(model, ids)
    return base != generate(model, ids)
