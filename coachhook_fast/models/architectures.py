"""Where each model family keeps its blocks and its FFN down-projection.

A layout is path templates. Families whose FFN output passes a norm before it joins the residual stream (Gemma 2 and 3)
also name that norm: a wished change of the block's output must be carried back through it. Known families name the FFN
too: theirs treat every token by itself, which cannot be said of every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Path templates with `{}` for the block's number (EasyEdit's `layer_module_tmp`, `rewrite_module_tmp`)."""

    layer_module_tmp: str
    rewrite_module_tmp: str
    ffn_tmp: str | None = None
    post_norm_tmp: str | None = None

    def block(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(self.layer_module_tmp.format(index))

    def down_projection(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(self.rewrite_module_tmp.format(index))

    def ffns(self, model: nn.Module) -> list[nn.Module]:
        """The FFN of every block, where it is known to treat every token by itself; else none."""
        if self.ffn_tmp is None:
            return []
        return [model.get_submodule(self.ffn_tmp.format(index)) for index in range(len(self.blocks(model)))]

    def post_norm(self, model: nn.Module, index: int) -> nn.Module | None:
        return None if self.post_norm_tmp is None else model.get_submodule(self.post_norm_tmp.format(index))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks of the model in order."""
        container = model.get_submodule(self.layer_module_tmp[: self.layer_module_tmp.index("{}")].rstrip("."))
        return list(container.children())


def _family(blocks: str, down_projection: str, post_norm: str | None = None) -> Layout:
    """A known family, whose FFNs are the modules `mlp` of its blocks."""
    block = f"{blocks}.{{}}"
    norm = None if post_norm is None else f"{block}.{post_norm}"
    return Layout(block, f"{block}.mlp.{down_projection}", f"{block}.mlp", norm)


_LLAMA = _family("model.layers", "down_proj")
_GEMMA = _family("model.layers", "down_proj", "post_feedforward_layernorm")

LAYOUTS: dict[str, Layout] = {
    "gpt2": _family("transformer.h", "c_proj"),
    "gptj": _family("transformer.h", "fc_out"),
    "gpt_neox": _family("gpt_neox.layers", "dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _family("model.language_model.layers", "down_proj", "post_feedforward_layernorm"),
}


def layout_of(
    model: nn.Module, *, layer_module_tmp: str | None = None, rewrite_module_tmp: str | None = None
) -> Layout:
    """The layout of `model`: the given templates, or those of its `config.model_type`.

    Raises:
        ValueError: the architecture is unknown and no templates were given, only one was given, a template has no
            single `{}`, or it names no module of this model.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    given = {"layer_module_tmp": layer_module_tmp, "rewrite_module_tmp": rewrite_module_tmp}
    if layer_module_tmp is None and rewrite_module_tmp is None:
        if model_type not in LAYOUTS:
            raise ValueError(
                f"architecture {model_type!r} is not known (known: {', '.join(sorted(LAYOUTS))}). Name its modules in "
                "EditConfig: layer_module_tmp='model.layers.{}' (a transformer block) and "
                "rewrite_module_tmp='model.layers.{}.mlp.down_proj' (its FFN down-projection), with {} for the number"
            )
        layout = LAYOUTS[model_type]
    else:
        for name, value in given.items():
            if value is None or value.count("{}") != 1:
                raise ValueError(f"{name} must be a module path with one '{{}}' for the block number, got {value!r}")
        known = LAYOUTS.get(model_type)
        post_norm = known.post_norm_tmp if known else None
        layout = Layout(str(layer_module_tmp), str(rewrite_module_tmp), post_norm_tmp=post_norm)
    for name, template in (
        ("layer_module_tmp", layout.layer_module_tmp),
        ("rewrite_module_tmp", layout.rewrite_module_tmp),
    ):
        try:
            model.get_submodule(template.format(0))
        except AttributeError as error:
            raise ValueError(f"{name} {template!r} names no module of {type(model).__name__}: {error}") from error
    return layout


def down_projection_size(module: Any) -> tuple[int, int]:
    """(out_features m, in_features d) of a down-projection; `Conv1D` keeps its weight as [d, m]."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nf), int(module.nx)
    raise ValueError(f"{type(module).__name__} has neither in_features/out_features nor nx/nf: not a linear layer")
