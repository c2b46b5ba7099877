"""Where a model keeps its blocks and their FFN down-projections: by its family's row, or found by structure.

A layout is path templates. Families whose FFN output passes a norm before it joins the residual stream (Gemma 2 and 3)
also name that norm: a wished change of the block's output must be carried back through it. Known families name the FFN
too: theirs treat every token by itself, which cannot be said of every model.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from torch import nn

from coachhook_fast.models.wrappers import slot, unwrapped


@dataclass(frozen=True)
class Layout:
    """Path templates with `{}` for the block's number (EasyEdit's `layer_module_tmp`, `rewrite_module_tmp`).

    Attributes:
        gain_attribute: of the text config, where the block multiplies the FFN's output before it adds it.
        is_known: a family of the table, whose blocks add nothing but the down-projection's output (through the norm or
            times the gain that are named); of others the editor asks a pass (models/residual.py).
        mixes_rows: its FFN sees the tokens of all rows in one list, in which the `sequence` gate finds no sequences.
    """

    layer_module_tmp: str
    rewrite_module_tmp: str
    ffn_tmp: str | None = None
    post_norm_tmp: str | None = None
    gain_attribute: str | None = None
    is_known: bool = False
    mixes_rows: bool = False

    def block(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(self.layer_module_tmp.format(index))

    def down_projection(self, model: nn.Module, index: int) -> nn.Module:
        """The base's own layer, within PEFT's adapters where there are any.

        Raises:
            ValueError: the block has none, such as a block of routed experts.
        """
        parent, name = self.slot(model, index)
        return parent.get_submodule(name)

    def slot(self, model: nn.Module, index: int) -> tuple[nn.Module, str]:
        """(parent, name) of it."""
        path = self.rewrite_module_tmp.format(index)
        try:
            return slot(model, path)
        except AttributeError:
            raise ValueError(self._no_such_block(model, index, path)) from None

    def has_down_projection(self, model: nn.Module, index: int) -> bool:
        try:
            model.get_submodule(self.rewrite_module_tmp.format(index))
        except AttributeError:
            return False
        return True

    def _no_such_block(self, model: nn.Module, index: int, path: str) -> str:
        there = [i for i in range(len(self.blocks(model))) if self.has_down_projection(model, i)]
        block = self.block(model, index)
        ffn = next((f"{name} is a {type(part).__name__}" for name, part in block.named_children() if _routes(part)), "")
        return (
            f"block {index} has no {path}{', its ' + ffn if ffn else ''}: routed experts are not edited. Blocks with "
            f"one are {there} (EditConfig(layers=...)); a shared expert is named by rewrite_module_tmp"
        )

    def ffns(self, model: nn.Module) -> list[nn.Module]:
        """The FFN of every block, where it is known to treat every token by itself; else none."""
        if self.ffn_tmp is None:
            return []
        return [model.get_submodule(self.ffn_tmp.format(index)) for index in range(len(self.blocks(model)))]

    def post_norm(self, model: nn.Module, index: int) -> nn.Module | None:
        return None if self.post_norm_tmp is None else model.get_submodule(self.post_norm_tmp.format(index))

    def gain(self, model: nn.Module) -> float:
        """What the FFN's output is multiplied with before the block adds it."""
        if self.gain_attribute is None:
            return 1.0
        first, *indices = self.gain_attribute.split(".")
        return float(reduce(operator.getitem, map(int, indices), getattr(text_config(model), first)))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """All blocks of the model in order."""
        container = model.get_submodule(self.layer_module_tmp[: self.layer_module_tmp.index("{}")].rstrip("."))
        return list(container.children())


def _routes(module: nn.Module) -> bool:
    """Whether it looks like a mixture of experts."""
    return any(name in module._modules for name in ("experts", "gate", "router")) and "down_proj" not in module._modules


def text_config(model: nn.Module) -> Any:
    """The config of the model's text part; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _family(
    blocks: str, down_projection: str, post_norm: str | None = None, *, ffn: str = "mlp", gain: str | None = None
) -> Layout:
    """A known family, whose FFNs are the modules `ffn` of its blocks."""
    block = f"{blocks}.{{}}"
    norm = None if post_norm is None else f"{block}.{post_norm}"
    return Layout(block, f"{block}.{ffn}.{down_projection}", f"{block}.{ffn}", norm, gain, is_known=True)


def _mixed(blocks: str, down_projection: str) -> Layout:
    """A family in which only some blocks have the down-projection: others mix experts, which may answer more than the
    hidden states."""
    return Layout(f"{blocks}.{{}}", f"{blocks}.{{}}.{down_projection}", is_known=True)


_LLAMA = _family("model.layers", "down_proj")
_GEMMA = _family("model.layers", "down_proj", "post_feedforward_layernorm")
_SOME_DENSE = _mixed("model.layers", "mlp.down_proj")

# Where models that see or hear keep their text model, whose own layout begins with `model.`.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.")

LAYOUTS: dict[str, Layout] = {
    "gpt2": _family("transformer.h", "c_proj"),
    "gptj": _family("transformer.h", "fc_out"),
    "gpt_neox": _family("gpt_neox.layers", "dense_4h_to_h"),
    "opt": Layout("model.decoder.layers.{}", "model.decoder.layers.{}.fc2", is_known=True, mixes_rows=True),
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "olmo", "smollm3", "glm", "cohere", "cohere2",
            "helium", "seed_oss", "arcee", "nemotron", "ministral", "ministral3", "ernie4_5", "hunyuan_v1_dense",
            "stablelm", "diffllama", "apertus", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), _GEMMA),
    "glm4": _family("model.layers", "down_proj", "post_mlp_layernorm"),
    "granite": _family("model.layers", "down_proj", gain="residual_multiplier"),
    "phi": _family("model.layers", "fc2"),
    "starcoder2": _family("model.layers", "c_proj"),
    "falcon_h1": Layout(
        "model.layers.{}", "model.layers.{}.feed_forward.down_proj", gain_attribute="mlp_multipliers.1", is_known=True
    ),
    "lfm2": _mixed("model.layers", "feed_forward.w2"),
    **dict.fromkeys(
        (
            "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_text", "deepseek_v2", "deepseek_v3", "glm4_moe", "dots1",
            "ernie4_5_moe",
        ),
        _SOME_DENSE,
    ),
    "llama4_text": _mixed("model.layers", "feed_forward.down_proj"),
    "jamba": _mixed("model.layers", "feed_forward.down_proj"),
}  # fmt: skip


def layout_of(
    model: nn.Module, *, layer_module_tmp: str | None = None, rewrite_module_tmp: str | None = None
) -> Layout:
    """The layout of `model`: the given templates, or those of its `config.model_type`, or what its structure shows.

    A model of an unknown type, or of a known one that is built otherwise (another text model within a vision model),
    is searched for the linear layer from the FFN's width to the model's in each block (models/structure.py).

    Raises:
        ValueError: only one template was given, a template has no single `{}`, or it names no module of this model in
            any block; the architecture is unknown and its structure is not plain.
    """
    from coachhook_fast.models.structure import found_layout

    model = unwrapped(model)
    given = {"layer_module_tmp": layer_module_tmp, "rewrite_module_tmp": rewrite_module_tmp}
    known = _known_layout(model)
    if layer_module_tmp is None and rewrite_module_tmp is None:
        return known or found_layout(model)
    for name, value in given.items():
        if value is None or value.count("{}") != 1:
            raise ValueError(f"{name} must be a module path with one '{{}}' for the block number, got {value!r}")
    if known is not None and (layer_module_tmp, rewrite_module_tmp) == (
        known.layer_module_tmp,
        known.rewrite_module_tmp,
    ):
        layout = known
    else:
        post_norm = known.post_norm_tmp if known else None
        layout = Layout(str(layer_module_tmp), str(rewrite_module_tmp), post_norm_tmp=post_norm)
    _check_block(layout, model)
    return layout


def _known_layout(model: nn.Module) -> Layout | None:
    """The row of the model's family, or that of its text part's, where that part stands; None where none fits."""
    config: Any = getattr(model, "config", None)
    layout = LAYOUTS.get(str(getattr(config, "model_type", "")))
    if layout is not None:
        return layout if _fits(layout, model) else None
    layout = LAYOUTS.get(str(getattr(text_config(model), "model_type", "")))
    within = [] if layout is None else [_moved(layout, prefix) for prefix in _TEXT_PREFIXES]
    return next((moved for moved in within if _fits(moved, model)), None)


def _moved(layout: Layout, prefix: str) -> Layout:
    """The layout of a text model `model.…` that stands at `prefix`."""
    paths = ("layer_module_tmp", "rewrite_module_tmp", "ffn_tmp", "post_norm_tmp")
    found = {name: getattr(layout, name) for name in paths}
    return replace(layout, **{name: path and prefix + path.removeprefix("model.") for name, path in found.items()})


def _fits(layout: Layout, model: nn.Module) -> bool:
    try:
        count = len(layout.blocks(model))
    except AttributeError:
        return False
    return any(layout.has_down_projection(model, index) for index in range(count))


def _check_block(layout: Layout, model: nn.Module) -> None:
    """ValueError unless the templates name modules of `model`."""
    try:
        layout.block(model, 0)
        count = len(layout.blocks(model))
    except AttributeError as error:
        raise ValueError(
            f"layer_module_tmp {layout.layer_module_tmp!r} names no module of {type(model).__name__}: {error}"
        ) from error
    if not any(layout.has_down_projection(model, index) for index in range(count)):
        raise ValueError(
            f"rewrite_module_tmp {layout.rewrite_module_tmp!r} names no module of {type(model).__name__} in any block"
        )


def down_projection_size(module: Any) -> tuple[int, int]:
    """(out_features m, in_features d) of a down-projection; `Conv1D` keeps its weight as [d, m]."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nf), int(module.nx)
    raise ValueError(f"{type(module).__name__} has neither in_features/out_features nor nx/nf: not a linear layer")
