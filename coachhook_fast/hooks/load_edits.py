"""A saved edit set into a model that has no editor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from coachhook_fast.config import EditConfig
from coachhook_fast.edits import store
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.edits.hub import local_folder
from coachhook_fast.hooks.hooks import DEFAULT, Hooks, checked_layers, hooks_of
from coachhook_fast.models.architectures import Layout, down_projection_size, layout_of
from coachhook_fast.models.loading import identified
from coachhook_fast.models.placement import check_loaded
from coachhook_fast.models.wrappers import unwrapped


def load_edits(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = DEFAULT,
    check: bool = True,
    revision: str | None = None,
) -> nn.Module:
    """Installs the edit set of `folder` into `model` and returns it; see `model.coachhook` for its switches.

    Args:
        model: the base model, in the dtype it was edited in, or in fp32 or bf16. It may stand within torch.compile's,
            DistributedDataParallel's or PEFT's wrappers, and have adapters: `coachhook` is an attribute of the model
            inside (`model.module.coachhook` of DDP's).
        folder: of a saved edit set, or "hf:owner/name" of a repository on the Hugging Face hub.
        name: other than DEFAULT, the edit set serves only the rows that `model.coachhook.select` gives to that name; it
            may join others, whose layers it must share.
        check: compare the base model's fingerprint; switch it off for quantised or fp16 copies of the right model only.
        revision: branch, tag or commit of the hub's repository; pin a commit to keep to what you have looked at.

    Example:
        model = load_edits(model, "hf:owner/edits", revision="0f6c2d1")

    Raises:
        ValueError: the folder holds no edit set, or one of another base model; the model has one already (DEFAULT), or
            others that this one does not fit; the model is unchanged then.
    """
    outer, model = model, unwrapped(model)
    check_loaded(model)
    edit_set = read_edits(model, folder, updates=False, check=check, revision=revision)
    standing = hooks_of(model)
    if standing is not None and (name != DEFAULT or standing.edit_set is None):
        _serve(standing, name, edit_set)
        return outer
    hooks = Hooks(model, _layout(model, edit_set.config), edit_set.layers, edit_set.config.gate)
    try:
        _serve(hooks, name, edit_set)
    except BaseException:
        hooks.unload()
        raise
    return outer


def read_edits(
    model: nn.Module, folder: str | Path, *, updates: bool = True, check: bool = True, revision: str | None = None
) -> EditSet:
    """The edit set for `model`: base and sizes of its layers are compared before a tensor is read. Raises ValueError as
    `load_edits` and `store.load` do."""

    def accept(made_for: str, base: Mapping[str, str], config: EditConfig) -> list[tuple[int, int]]:
        if check:
            here = identified(model)
            store.check_base(made_for, here.fingerprint, base, here.parts)
        layout = _layout(model, config)
        layers = checked_layers(model, layout, config.layers or ())
        return [down_projection_size(layout.down_projection(model, layer)) for layer in layers]

    return store.load(local_folder(folder, revision=revision), updates=updates, accept=accept)


def _layout(model: nn.Module, config: EditConfig) -> Layout:
    return layout_of(model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp)


def _serve(hooks: Hooks, name: str, edit_set: EditSet) -> None:
    if name == DEFAULT:
        hooks.publish(edit_set)
    else:
        hooks.add_edits(name, edit_set)
