"""A saved edit set into a model that has no editor."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from coachhook_fast.edits import store
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.hooks.hooks import DEFAULT, Hooks, hooks_of
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.loading import fingerprint


def load_edits(model: nn.Module, folder: str | Path, *, name: str = DEFAULT, check: bool = True) -> nn.Module:
    """Installs the edit set of `folder` into `model` and returns it; see `model.coachhook` for its switches.

    Args:
        model: the base model, in the dtype it was edited in, or in fp32 or bf16.
        folder: of a saved edit set, or the name of a repository on the Hugging Face hub.
        name: other than DEFAULT, the edit set serves only the rows that `model.coachhook.select` gives to that name; it
            may join others, whose layers it must share.
        check: compare the base model's fingerprint; switch it off for quantised or fp16 copies of the right model only.

    Raises:
        ValueError: the folder holds no edit set, or one of another base model; the model has one already (DEFAULT), or
            others that this one does not fit; the model is unchanged then.
    """
    edit_set = store.load(store.local_folder(folder), updates=False)
    if check:
        store.check_base(edit_set, fingerprint(model))
    standing = hooks_of(model)
    if standing is not None and (name != DEFAULT or standing.edit_set is None):
        _serve(standing, name, edit_set)
        return model
    config = edit_set.config
    layout = layout_of(model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp)
    hooks = Hooks(model, layout, edit_set.layers, config.gate)
    try:
        _serve(hooks, name, edit_set)
    except BaseException:
        hooks.unload()
        raise
    return model


def _serve(hooks: Hooks, name: str, edit_set: EditSet) -> None:
    if name == DEFAULT:
        hooks.publish(edit_set)
    else:
        hooks.add_edits(name, edit_set)
