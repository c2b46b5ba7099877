"""Tiny random models of families beyond `tiny.FAMILIES`: a row a family, with where its down-projections are.

`FAMILY_LIST` is the list that docs/models.md shows: every family is built, found and asked in
tests/models/test_families.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 45,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0, 1],
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 20,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
_MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 16,
    "mamba_n_heads": 2,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_d_conv": 3,
    "mamba_chunk_size": 8,
    "mlp_multipliers": [0.9, 0.6],
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_DOWN = "model.layers.{}.mlp.down_proj"


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        template: where its down-projections are; blocks: those that have one.
        gain: what a block multiplies the FFN's output with; None where a norm follows.
        text: config fields of the text part, for models that see.
    """

    template: str = _DOWN
    fields: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[int, ...] = (0, 1, 2, 3)
    gain: float | None = 1.0
    text: dict[str, Any] | None = None
    vision: dict[str, Any] = field(default_factory=lambda: dict(_VISION))


_QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 20, "num_heads": 2, "out_hidden_size": 24}
_SEEING = "model.language_model.layers.{}.mlp.down_proj"

FAMILY_LIST: dict[str, Family] = {
    **dict.fromkeys(
        (
            "gemma", "olmo", "smollm3", "glm", "cohere", "cohere2", "helium", "seed_oss", "arcee", "nemotron",
            "ministral", "ministral3", "ernie4_5", "hunyuan_v1_dense", "stablelm", "diffllama", "apertus", "phi3",
        ),
        Family(),
    ),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "glm4"), Family(gain=None)),
    "granite": Family(fields={"residual_multiplier": 0.4}, gain=0.4),
    "phi": Family("model.layers.{}.mlp.fc2", {"partial_rotary_factor": 1.0}),
    "starcoder2": Family("model.layers.{}.mlp.c_proj"),
    "opt": Family("model.decoder.layers.{}.fc2", {"ffn_dim": 45, "word_embed_proj_dim": 24}),
    "falcon_h1": Family("model.layers.{}.feed_forward.down_proj", _MAMBA, gain=0.6),
    "lfm2": Family(
        "model.layers.{}.feed_forward.w2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "qwen2_moe": Family(fields=_EXPERTS, blocks=(0, 1)),
    "qwen3_moe": Family(fields=_EXPERTS, blocks=(0, 1)),
    "qwen3_next": Family(fields=_EXPERTS | _LINEAR_ATTENTION, blocks=(0, 1)),
    "qwen3_5_text": Family(fields=_LINEAR_ATTENTION),
    "deepseek_v2": Family(fields=_DEEPSEEK, blocks=(0, 1)),
    "deepseek_v3": Family(fields=_DEEPSEEK, blocks=(0, 1)),
    "glm4_moe": Family(fields=_DEEPSEEK | {"head_dim": 6}, blocks=(0, 1)),
    "dots1": Family(fields=_DEEPSEEK | {"head_dim": 6}, blocks=(0, 1)),
    "llama4_text": Family(
        "model.layers.{}.feed_forward.down_proj",
        {"intermediate_size_mlp": 45, "intermediate_size": 20, "num_local_experts": 4, "moe_layers": [2, 3]},
        blocks=(0, 1),
    ),
    "gemma3": Family(_SEEING, text={"model_type": "gemma3_text"}, gain=None, fields={"mm_tokens_per_image": 4}),
    "llava": Family(_SEEING, text={"model_type": "llama"}, vision={**_VISION, "model_type": "clip_vision_model"}),
    "mistral3": Family(
        _SEEING, text={"model_type": "mistral"}, vision={**_VISION, "model_type": "pixtral", "head_dim": 8}
    ),
    "qwen2_5_vl": Family(_SEEING, text={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
                         vision=_QWEN_VISION),
    "qwen3_vl": Family(_SEEING, text={"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
                       vision={**_QWEN_VISION, "deepstack_visual_indexes": [0]}),
}  # fmt: skip

# No row in the table: found by structure.
FOUND_BY_STRUCTURE: dict[str, Family] = {
    "bloom": Family("transformer.h.{}.mlp.dense_4h_to_h", {"intermediate_size": None}),
    "mpt": Family(
        "transformer.blocks.{}.ffn.down_proj", {"d_model": 24, "n_heads": 4, "n_layers": 4, "intermediate_size": None}
    ),
    "falcon": Family("transformer.h.{}.mlp.dense_4h_to_h", {"ffn_hidden_size": 45, "head_dim": None}),
    "granitemoehybrid": Family(
        "model.layers.{}.shared_mlp.output_linear",
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 12,
            "shared_intermediate_size": 45,
            "residual_multiplier": 0.4,
            "num_local_experts": 0,
            "layer_types": ["mamba", "attention", "mamba", "attention"],
            "intermediate_size": 20,
        },
        gain=0.4,
    ),
}


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def family_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of a row, in eval mode."""
    family = {**FAMILY_LIST, **FOUND_BY_STRUCTURE}[name]
    if family.text is None:
        config = AutoConfig.for_model(name, **_given({**_SIZES, **family.fields}))
        loader: Any = AutoModelForCausalLM
    else:
        config = AutoConfig.for_model(
            name, text_config={**_SIZES, **family.text}, vision_config=dict(family.vision), **family.fields
        )
        loader = AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = loader.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()
