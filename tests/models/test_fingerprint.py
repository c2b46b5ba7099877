"""The fingerprint that an edit set knows its base model by, of a model and of its checkpoint on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from coachhook_fast.models.loading import checkpoint_fingerprint, fingerprint


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3"])
def test_a_checkpoint_has_its_models_fingerprint(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_model(family)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert checkpoint_fingerprint(str(tmp_path), model.config) == fingerprint(model)
    # as older files have them: without the model's prefix, with buffers, and the tied head a second time
    path, prefix = tmp_path / "model.safetensors", f"{model.base_model_prefix}."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in load_file(path).items()}
    head = model.get_output_embeddings().weight.detach().clone()
    save_file({**tensors, "lm_head.weight": head, "h.0.attn.bias": torch.ones(3)}, path)
    assert checkpoint_fingerprint(str(tmp_path), model.config) == fingerprint(model)
    tensors[next(name for name in tensors if "norm" in name or "ln" in name)] += 1
    save_file(tensors, path)
    assert checkpoint_fingerprint(str(tmp_path), model.config) not in (None, fingerprint(model))
    save_file({"another.name": torch.ones(3)}, path)
    assert checkpoint_fingerprint(str(tmp_path), model.config) is None
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        checkpoint_fingerprint(str(tmp_path), model.config)
    path.unlink()
    assert checkpoint_fingerprint(str(tmp_path), model.config) is None
    assert checkpoint_fingerprint("nobody/nothing", model.config) is None
