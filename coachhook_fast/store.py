"""The edit set on disk: safetensors + JSON in a folder (never pickle).

    edits/
      edit_set.json                 format version, base model, config, contexts, ledger, name and sha256 of each file
      weights-<hash>.safetensors    U, B, threshold of every layer: all that serving needs
      batch-<id>.safetensors        K, R, X of a batch: what going on and rolling back need

Tensor files are written and synced first, under names of their own; renaming `edit_set.json` over its predecessor is
the commit. A kill at any moment leaves the last committed version whole; files that no version names are swept later.
Writers take turns by a lock on `.lock`, which the system releases when a process dies; of two that write, the later
one's edit set is what stands there. Readers take no lock: one whose files are swept meanwhile reads the new version.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from coachhook_fast.architectures import layout_of
from coachhook_fast.config import EditConfig
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.edit_set import Batch, EditOutcome, EditSet, LayerUpdate
from coachhook_fast.gate import Threshold
from coachhook_fast.hooks import DEFAULT, Hooks, hooks_of
from coachhook_fast.models import fingerprint
from coachhook_fast.request import EditRequest

FORMAT = 1
MANIFEST = "edit_set.json"
LOCK = ".lock"
_OURS = re.compile(r"(weights|batch)-[0-9a-f]{16}(\.safetensors|\.\d+\.tmp)|edit_set\.json\.\d+\.tmp")
_FIELDS = {"format", "model", "config", "contexts", "thresholds", "weights", "batches"}
_NEWER_FIELDS = {"statistics"}  # sets written before they were there lack them
_BATCH_FIELDS = {"id", "parent", "time", "seconds", "metrics", "alphas", "thresholds", "outcomes", "tensors"}


def save(edit_set: EditSet, folder: Path) -> None:
    """Writes `edit_set` into `folder`; files of batches that stand there already are kept as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        weights = {
            f"{position}.{name}": tensor
            for position, delta in enumerate(edit_set.deltas)
            for name, tensor in delta.state_dict().items()
        }
        parents = [None, *(batch.id for batch in edit_set.batches)]
        manifest = {
            "format": FORMAT,
            "model": edit_set.model,
            "config": edit_set.config.to_dict(),
            "contexts": list(edit_set.contexts),
            "thresholds": [_threshold_to_json(threshold) for threshold in edit_set.thresholds],
            "weights": _write_tensors(folder, "weights", weights),
            "statistics": edit_set.statistics,
            "batches": [
                _batch_to_json(folder, batch, parent) for batch, parent in zip(edit_set.batches, parents, strict=False)
            ],
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
    return _read_whole(folder, _edit_set_of)


def _edit_set_of(folder: Path, manifest: Mapping[str, Any]) -> EditSet:
    config = EditConfig.from_dict(manifest["config"])
    assert config.layers is not None
    tensors = _read_tensors(folder, manifest["weights"])
    deltas = tuple(_delta_of(tensors, position) for position in range(len(config.layers)))
    ids = [None, *(line.get("id") for line in manifest["batches"])]
    for line, parent in zip(manifest["batches"], ids, strict=False):
        if line.get("parent") != parent:
            raise ValueError(f"the ledger of {folder} is broken: batch {line.get('id')!r} does not follow {parent!r}")
    return EditSet(
        model=manifest["model"],
        config=config,
        contexts=tuple(manifest["contexts"]),
        deltas=deltas,
        thresholds=tuple(_threshold_from_json(value) for value in manifest["thresholds"]),
        batches=tuple(_batch_from_json(folder, line) for line in manifest["batches"]),
        statistics=str(manifest.get("statistics", "")),
    )


def load_weights(folder: Path) -> list[tuple[LowRankDelta, float]]:
    """The serving part alone: (delta, threshold) of each edited layer; see `load`."""
    return _read_whole(folder, _weights_of)


def _weights_of(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[LowRankDelta, float]]:
    tensors = _read_tensors(folder, manifest["weights"])
    thresholds = [_threshold_from_json(value).value for value in manifest["thresholds"]]
    return [(_delta_of(tensors, position), threshold) for position, threshold in enumerate(thresholds)]


def version_of(manifest: Mapping[str, Any]) -> str:
    """Names what an edit set serves: 12 hex digits over deltas and thresholds."""
    served = json.dumps([manifest["weights"]["sha256"], manifest["thresholds"]])
    return hashlib.sha256(served.encode()).hexdigest()[:12]


def _read_whole(folder: Path, read: Callable[[Path, Mapping[str, Any]], Any]) -> Any:
    """Reads one version whole: if a writer swept its files meanwhile, the version that took its place."""
    while True:
        manifest = read_manifest(folder)
        try:
            with parsing(folder):
                return read(folder, manifest)
        except ValueError:
            if read_manifest(folder) == manifest:
                raise


@contextmanager
def parsing(folder: Path) -> Iterator[None]:
    """What a manifest of another shape than ours raises within it becomes a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        kind = type(error).__name__
        raise ValueError(f"{folder / MANIFEST} does not have the shape of an edit set: {kind} {error}") from error


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
    if set(manifest) - _NEWER_FIELDS != _FIELDS:
        raise ValueError(f"{path} has the fields {sorted(manifest)}, expected {sorted(_FIELDS)}")
    return manifest


def check_base(edit_set: EditSet, model_id: str) -> None:
    """ValueError unless the edit set belongs to the base model with fingerprint `model_id`."""
    if edit_set.model != model_id:
        raise ValueError(
            f"edits belong to another base model: they were made for fingerprint {edit_set.model}, "
            f"this model's is {model_id} (a copy of the right model in fp16, or a quantised one, differs in its last "
            "digits: load_edits(..., check=False))"
        )


def check_continues(edit_set: EditSet, model_id: str, config: EditConfig) -> None:
    """ValueError unless editing can go on from `edit_set` with `config` on this model."""
    check_base(edit_set, model_id)
    for name in ("layers", "mom2_update_weight", "gate", "context_seeds", "context_tokens", "subject_templates"):
        old, new = getattr(edit_set.config, name), getattr(config, name)
        if old != new:
            raise ValueError(f"{name} is {new!r}, but the edits to go on from were made with {old!r}")


def push_to_hub(
    edit_set: EditSet,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Edit set of coachhook-fast",
) -> str:
    """Uploads the edit set to the Hugging Face hub in one commit and returns its address.

    Args:
        repo_id: "user/name"; made if it is not there.

    Raises:
        What huggingface_hub raises where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as staging:
        save(edit_set, Path(staging))
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=staging, commit_message=commit_message,
                allow_patterns=[MANIFEST, "*.safetensors"], delete_patterns="*.safetensors",
            )
        )  # fmt: skip


def local_folder(name: str | Path, *, token: str | None = None) -> Path:
    """`name` where it is a folder, else the hub's repository of that name, downloaded.

    Raises:
        ValueError: neither.
    """
    if Path(name).is_dir() or str(name).count("/") != 1 or str(name).startswith((".", "/")):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[MANIFEST, "*.safetensors"], token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(f"edits {str(name)!r} is neither a folder nor a repository of the hub: {error}") from error


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
    edit_set = load(local_folder(folder))
    if check:
        check_base(edit_set, fingerprint(model))
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


# -------------------------------------------------------------------- batches


def _batch_to_json(folder: Path, batch: Batch, parent: str | None) -> dict[str, Any]:
    tensors = {
        f"{position}.{name}": getattr(update, name)
        for position, update in enumerate(batch.layers)
        for name in ("keys", "residuals", "directions")
    }
    return {
        "id": batch.id,
        "parent": parent,
        "time": batch.time,
        "seconds": batch.seconds,
        "metrics": batch.metrics,
        "alphas": [_number(update.alpha) for update in batch.layers],
        "thresholds": [_threshold_to_json(threshold) for threshold in batch.thresholds],
        "outcomes": [asdict(outcome) for outcome in batch.outcomes],
        "tensors": _write_tensors(folder, "batch", tensors),
    }


def _batch_from_json(folder: Path, line: Mapping[str, Any]) -> Batch:
    if set(line) != _BATCH_FIELDS:
        raise ValueError(f"a ledger line of {folder} has the fields {sorted(line)}, expected {sorted(_BATCH_FIELDS)}")
    tensors = _read_tensors(folder, line["tensors"])
    return Batch(
        id=line["id"],
        time=line["time"],
        seconds=line["seconds"],
        metrics=line["metrics"],
        outcomes=tuple(
            EditOutcome(
                _request_of(outcome["request"]), outcome["loss"], outcome["steps"], tuple(outcome["strength"]),
                outcome["residual_left"], outcome.get("in_context_only", False),
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


def _request_of(fields: Mapping[str, Any]) -> EditRequest:
    unknown = sorted(set(fields) - set(EditRequest.__dataclass_fields__))
    if unknown:
        raise ValueError(f"a request in the ledger has unknown fields {unknown}")
    return EditRequest(**fields)


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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time; systems without flock go without."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
    try:
        content = path.read_bytes()  # once: a writer may sweep the file at any moment
    except FileNotFoundError:
        raise ValueError(f"edit set is incomplete: {path} is missing") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{path} is damaged: sha256 {digest}, the edit set names {entry['sha256']}")
    return from_bytes(content)


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
    """Removes tensor files that the committed version does not name, and leftovers of killed writers; of other files,
    for edits may lie in a model's folder, none."""
    named = {manifest["weights"]["file"], *(line["tensors"]["file"] for line in manifest["batches"])}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
