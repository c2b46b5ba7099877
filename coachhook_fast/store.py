"""The edit set on disk: safetensors + JSON in a folder (never pickle).

    edits/
      edit_set.json                 format version, base model, config, contexts, ledger, name and sha256 of each file
      weights-<hash>.safetensors    U, B, threshold of every layer: all that serving needs
      batch-<id>.safetensors        K, R, X of a batch: what going on and rolling back need

Tensor files are written and synced first, under names of their own; renaming `edit_set.json` over its predecessor is
the commit. A kill at any moment leaves the last committed version whole; files that no version names are swept later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from coachhook_fast.architectures import layout_of
from coachhook_fast.config import EditConfig
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.edit_set import Batch, EditOutcome, EditSet, LayerUpdate
from coachhook_fast.gate import Threshold
from coachhook_fast.hooks import Hooks
from coachhook_fast.models import fingerprint
from coachhook_fast.request import EditRequest

FORMAT = 1
MANIFEST = "edit_set.json"
_FIELDS = {"format", "model", "config", "contexts", "thresholds", "weights", "batches"}


def save(edit_set: EditSet, folder: Path) -> None:
    """Writes `edit_set` into `folder`; files of batches that stand there already are kept as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{position}.{name}": tensor
        for position, delta in enumerate(edit_set.deltas)
        for name, tensor in delta.state_dict().items()
    }
    manifest = {
        "format": FORMAT,
        "model": edit_set.model,
        "config": edit_set.config.to_dict(),
        "contexts": list(edit_set.contexts),
        "thresholds": [_threshold_to_json(threshold) for threshold in edit_set.thresholds],
        "weights": _write_tensors(folder, "weights", weights),
        "batches": [_batch_to_json(folder, batch) for batch in edit_set.batches],
    }
    staging = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    _write_synced(staging, json.dumps(manifest, indent=1).encode())
    staging.replace(folder / MANIFEST)
    _sync_folder(folder)
    _sweep(folder, manifest)


def load(folder: Path) -> EditSet:
    """Reads the committed edit set of `folder`.

    Raises:
        ValueError: no edit set there, an unknown format or field, a file that is missing or whose checksum differs.
    """
    manifest = read_manifest(folder)
    config = EditConfig.from_dict(manifest["config"])
    assert config.layers is not None
    tensors = _read_tensors(folder, manifest["weights"])
    deltas = tuple(_delta_of(tensors, position) for position in range(len(config.layers)))
    return EditSet(
        model=manifest["model"],
        config=config,
        contexts=tuple(manifest["contexts"]),
        deltas=deltas,
        thresholds=tuple(_threshold_from_json(value) for value in manifest["thresholds"]),
        batches=tuple(_batch_from_json(folder, line) for line in manifest["batches"]),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The JSON part alone, checked: enough to list a ledger without a model."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"folder {str(folder)!r} holds no edit set: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}")
    if set(manifest) != _FIELDS:
        raise ValueError(f"{path} has the fields {sorted(manifest)}, expected {sorted(_FIELDS)}")
    return manifest


def check_base(edit_set: EditSet, model_id: str) -> None:
    """ValueError unless the edit set belongs to the base model with fingerprint `model_id`."""
    if edit_set.model != model_id:
        raise ValueError(
            f"edits belong to another base model: they were made for fingerprint {edit_set.model}, "
            f"this model's is {model_id}"
        )


def check_continues(edit_set: EditSet, model_id: str, config: EditConfig) -> None:
    """ValueError unless editing can go on from `edit_set` with `config` on this model."""
    check_base(edit_set, model_id)
    for name in ("layers", "mom2_update_weight", "gate", "context_seeds", "context_tokens"):
        old, new = getattr(edit_set.config, name), getattr(config, name)
        if old != new:
            raise ValueError(f"{name} is {new!r}, but the edits to go on from were made with {old!r}")


def load_edits(model: nn.Module, folder: str | Path, *, check: bool = True) -> nn.Module:
    """Installs the edit set of `folder` into `model` and returns it; see `model.coachhook` for its switches.

    Args:
        model: the base model, in any floating dtype.
        check: compare the base model's fingerprint; switch it off for quantised copies of the right model only.

    Raises:
        ValueError: the folder holds no edit set, or one of another base model; the model is unchanged then.
    """
    edit_set = load(Path(folder))
    if check:
        check_base(edit_set, fingerprint(model))
    config = edit_set.config
    layout = layout_of(model, layer_module_tmp=config.layer_module_tmp, rewrite_module_tmp=config.rewrite_module_tmp)
    hooks = Hooks(model, layout, edit_set.layers, config.gate)
    try:
        hooks.publish(edit_set)
    except BaseException:
        hooks.unload()
        raise
    return model


# -------------------------------------------------------------------- batches


def _batch_to_json(folder: Path, batch: Batch) -> dict[str, Any]:
    tensors = {
        f"{position}.{name}": getattr(update, name)
        for position, update in enumerate(batch.layers)
        for name in ("keys", "residuals", "directions")
    }
    return {
        "id": batch.id,
        "time": batch.time,
        "seconds": batch.seconds,
        "metrics": batch.metrics,
        "alphas": [_number(update.alpha) for update in batch.layers],
        "thresholds": [_threshold_to_json(threshold) for threshold in batch.thresholds],
        "outcomes": [asdict(outcome) for outcome in batch.outcomes],
        "tensors": _write_tensors(folder, "batch", tensors),
    }


def _batch_from_json(folder: Path, line: Mapping[str, Any]) -> Batch:
    tensors = _read_tensors(folder, line["tensors"])
    return Batch(
        id=line["id"],
        time=line["time"],
        seconds=line["seconds"],
        metrics=line["metrics"],
        outcomes=tuple(
            EditOutcome(
                EditRequest(**outcome["request"]), outcome["loss"], outcome["steps"], tuple(outcome["strength"]),
                outcome["residual_left"],
            )
            for outcome in line["outcomes"]
        ),
        thresholds=tuple(_threshold_from_json(value) for value in line["thresholds"]),
        layers=tuple(
            LayerUpdate(
                tensors[f"{position}.keys"], tensors[f"{position}.residuals"], tensors[f"{position}.directions"],
                math.inf if alpha is None else alpha,
            )
            for position, alpha in enumerate(line["alphas"])
        ),
    )  # fmt: skip


def _delta_of(tensors: Mapping[str, Tensor], position: int) -> LowRankDelta:
    return LowRankDelta.from_state_dict(
        {name: tensors[f"{position}.{name}"] for name in ("U", "B") if f"{position}.{name}" in tensors}
    )


def _threshold_to_json(threshold: Threshold) -> list[float | None]:
    return [_number(threshold.value), _number(threshold.mean), _number(threshold.std)]


def _threshold_from_json(values: list[float | None]) -> Threshold:
    value, mean, std = values
    return Threshold(
        math.inf if value is None else value,
        math.nan if mean is None else mean,
        math.nan if std is None else std,
    )


def _number(value: float) -> float | None:
    """JSON has no infinity or NaN."""
    return value if math.isfinite(value) else None


# -------------------------------------------------------------------- files


def _write_tensors(folder: Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Writes a file named by its content; its name and sha256 for the manifest."""
    content = to_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{kind}-{digest[:16]}.safetensors"
    if not path.is_file() or path.stat().st_size != len(content):
        staging = path.with_suffix(f".{os.getpid()}.tmp")
        _write_synced(staging, content)
        staging.replace(path)
    return {"file": path.name, "sha256": digest}


def _read_tensors(folder: Path, entry: Mapping[str, str]) -> dict[str, Tensor]:
    path = folder / Path(entry["file"]).name
    if not path.is_file():
        raise ValueError(f"edit set is incomplete: {path} is missing")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{path} is damaged: sha256 {digest}, the edit set names {entry['sha256']}")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the renames themselves durable; not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Removes tensor files that the committed version does not name, and leftovers of killed writers."""
    named = {manifest["weights"]["file"], *(line["tensors"]["file"] for line in manifest["batches"])}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.tmp")]:
        if path.name not in named:
            path.unlink(missing_ok=True)
