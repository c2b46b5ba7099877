"""Contexts: the texts beside the bare prompt in which a request's subject is read and its target wished.

Two kinds, told apart by a slot: a beginning that the un-edited model wrote stands before the prompt; a template with
`{}` takes the subject and stands in the prompt's place, so that the target does not hang on the prompt's wording.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coachhook_fast.config import EditConfig
from coachhook_fast.models.placement import input_device
from coachhook_fast.request import prompt_ids


@torch.inference_mode()
def write_contexts(model: nn.Module, tokenizer: Any, config: EditConfig) -> tuple[str, ...]:
    """One text a seed of `config.context_seeds` (the seed and `context_tokens` greedy tokens), then the templates."""
    texts = []
    generate: Any = model.generate
    for seed in config.context_seeds:
        begin = torch.tensor([prompt_ids(tokenizer, seed)], device=input_device(model))
        ids = generate(
            input_ids=begin,
            attention_mask=torch.ones_like(begin),
            max_new_tokens=config.context_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        # A slot or a line break inside a context would be read as part of the prompt's own form.
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        texts.append(" ".join(text.replace("{", " ").replace("}", " ").split()))
    return (*texts, *config.subject_templates)
