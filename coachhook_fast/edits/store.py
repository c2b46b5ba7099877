"""The edit set on disk: safetensors + JSON in a folder (never pickle).

    edits/
      edit_set.json                 format version, base model, config, contexts, ledger, name and sha256 of each file
      weights-<hash>.safetensors    U, B, W of every layer: all that serving needs
      batch-<hash>.safetensors      K, R, X, E[kkᵀ]X of a batch: what going on and rolling back need

Tensor files are written and synced first, under names of their own; renaming `edit_set.json` over its predecessor is
the commit. A kill at any moment leaves the last committed version whole; files that no version names are swept later.
Writers take turns by a lock (edits/lock.py), and one that does not go on from the committed version is refused: of
two that write, none loses what the other was told is saved. Readers take no lock: one whose files are swept meanwhile
reads the new version.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coachhook_fast import files
from coachhook_fast.config import EditConfig
from coachhook_fast.edits.check import check_deltas, check_updates
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditSet, LayerUpdate
from coachhook_fast.edits.lock import holder, locked
from coachhook_fast.edits.manifest import (  # fmt: skip
    FORMAT,
    MANIFEST,
    State,
    alpha_of,
    batch_line,
    columns_in,
    committed_state,
    outcomes_in,
    read_manifest,
    removed_in,
    removed_line,
    request_alphas_in,
    state_of_manifest,
    thresholds_line,
    thresholds_of,
    to_json,
)
from coachhook_fast.edits.tensors import read_tensors, write_tensors

Accept = Callable[[str, Mapping[str, str], EditConfig], Sequence[tuple[int, int]]]
_UPDATE = ("keys", "residuals", "directions")  # tensors of a layer's update
_NAMED = 4  # parameters that a message names
_SPREAD = "spread"  # a fourth, under threshold_whitened
_OURS_ON_THE_HUB = [f"{kind}-{'[0-9a-f]' * 16}.safetensors" for kind in ("weights", "batch")]
_OURS = re.compile(
    rf"(weights|batch)-[0-9a-f]{{16}}(\.safetensors)?({files.STAGING})?|{re.escape(MANIFEST)}{files.STAGING}"
)


class ConflictError(ValueError):
    """A folder holds an edit set that the one to be saved does not go on from."""


def save(edit_set: EditSet, folder: Path, *, overwrite: bool = False) -> None:
    """Writes `edit_set` into `folder`; files of batches that stand there already are kept as they are.

    Args:
        overwrite: also over an edit set that this one does not go on from.

    Raises:
        ConflictError: `folder` holds batches and removals that are neither this set's first ones nor all that it held
            when this set, or one that it was made from, was last read from there or written there.
        ValueError: it was loaded for serving, without its batches' updates; or holds what `load` would not take.
    """
    edit_set.check_updates()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        ours = state_of(edit_set)
        if not overwrite:
            _check_follows(edit_set, ours, folder)
        weights = {
            f"{position}.{name}": tensor
            for position, delta in enumerate(edit_set.deltas)
            for name, tensor in delta.state_dict().items()
        }
        parents = [None, *(batch.id for batch in edit_set.batches)]
        manifest = {
            "format": FORMAT,
            "model": edit_set.model,
            "base": dict(edit_set.base),
            "config": edit_set.config.to_dict(),
            "contexts": list(edit_set.contexts),
            "thresholds": thresholds_line(edit_set.thresholds),
            "weights": write_tensors(folder, "weights", weights),
            "statistics": edit_set.statistics,
            "removed": [removed_line(one) for one in edit_set.removed],
            "batches": [
                batch_line(batch, parent, _write_batch(folder, batch))
                for batch, parent in zip(edit_set.batches, parents, strict=False)
            ],
        }
        files.write_synced(folder / MANIFEST, to_json(manifest))
        files.sync_folder(folder)
        edit_set.seen[_place(folder)] = ours
        _sweep(folder, manifest)


def state_of(edit_set: EditSet) -> tuple[State, State]:
    """What tells this version of the set from others of its line: see `manifest.state_of_manifest`."""
    lines = [
        {"id": batch.id, "outcomes": [{"request": vars(request)} for request in batch.requests]}
        for batch in edit_set.batches
    ]
    removed = [{"batch": one.batch, "index": one.index} for one in edit_set.removed]
    return state_of_manifest({"batches": lines, "removed": removed})


def _check_follows(edit_set: EditSet, ours: tuple[State, State], folder: Path) -> None:
    if not (folder / MANIFEST).exists():
        return
    committed = committed_state(folder)
    goes_on = all(mine[: len(theirs)] == theirs for mine, theirs in zip(ours, committed, strict=True))
    if goes_on or committed == edit_set.seen.get(_place(folder)):
        return
    batches, removed = committed
    held = f"{len(batches)} batches" + (f" up to {batches[-1][0]!r}" if batches else "")
    raise ConflictError(
        f"{folder} holds another edit set by now, of {held}{f' and {len(removed)} removed edits' if removed else ''}, "
        f"written by {holder(folder)}: go on from that one (--edits, Editor(edits=...)), or save into another folder"
    )


def _place(folder: Path) -> str:
    return str(folder.resolve())


def load(folder: Path, *, updates: bool = True, accept: Accept | None = None) -> EditSet:
    """Reads the committed edit set of `folder`, and checks all that serving and editing rely on (edits/check.py).

    Args:
        updates: False leaves the batches' tensors where they are, the bulk of it, and reads what serving needs: such a
            set cannot be edited, rolled back or saved.
        accept: called with the base model's fingerprint, its parts (`EditSet.base`) and the settings before a tensor is
            read; gives (m, d) of each layer, or raises ValueError.

    Raises:
        ValueError: no edit set there, an unknown format or field, a file that is missing or whose checksum differs, a
            value that no editor writes. The message names the file or the folder.
    """
    return _read_whole(folder, functools.partial(_edit_set_of, updates=updates, accept=accept))


def _edit_set_of(folder: Path, manifest: Mapping[str, Any], *, updates: bool, accept: Accept | None) -> EditSet:
    config = EditConfig.from_saved(manifest["config"])
    assert config.layers is not None  # read_manifest has looked
    layers = len(config.layers)
    sizes = None if accept is None else accept(manifest["model"], manifest.get("base", {}), config)
    found = EditSet(
        model=manifest["model"],
        config=config,
        contexts=tuple(manifest["contexts"]),
        deltas=_read_deltas(folder, manifest, sizes),
        thresholds=thresholds_of(manifest["thresholds"], layers),
        batches=tuple(_read_batch(folder, line, layers, updates=updates) for line in manifest["batches"]),
        statistics=str(manifest.get("statistics", "")),
        removed=removed_in(manifest),
        base=manifest.get("base", {}),
        seen={_place(folder): state_of_manifest(manifest)},
    )
    if updates:
        with _named(folder):
            check_updates(found)
    return found


def load_weights(folder: Path) -> list[tuple[LowRankDelta, float]]:
    """The serving part alone: (delta as served, threshold) of each edited layer; see `load`."""
    return _read_whole(folder, _weights_of)


def _weights_of(folder: Path, manifest: Mapping[str, Any]) -> list[tuple[LowRankDelta, float]]:
    deltas = _read_deltas(folder, manifest)
    thresholds = thresholds_of(manifest["thresholds"], len(deltas))
    return [(delta.served(), threshold.value) for delta, threshold in zip(deltas, thresholds, strict=True)]


def _read_whole(folder: Path, read: Callable[[Path, Mapping[str, Any]], Any]) -> Any:
    """Reads one version whole: if a writer swept its files meanwhile, the version that took its place."""
    while True:
        before = _commit_of(folder)
        try:
            return read(folder, read_manifest(folder))
        except ValueError:
            if _commit_of(folder) == before:
                raise


def _commit_of(folder: Path) -> tuple[int, int] | None:
    """Tells commits apart; their contents may be equal, where two writers take turns."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def check_base(made_for: str, model_id: str, base: Mapping[str, str], parts: Mapping[str, str]) -> None:
    """ValueError unless edits made for the base model with fingerprint `made_for` belong to that of `model_id`; it
    names what of the parameters is otherwise, by their descriptions `base` and `parts`."""
    if made_for != model_id:
        raise ValueError(
            f"edits belong to another base model: they were made for fingerprint {made_for}, "
            f"this model's is {model_id}{_otherwise(base, parts)} (a copy of the right model in fp16, or a quantised "
            "one, differs in its last digits: load_edits(..., check=False))"
        )


def _otherwise(base: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What of `here` is not as in `base`, to go on a message with; "" where nothing is known of `base`."""
    if not base:
        return ""
    found = []
    for name in sorted({*base, *here}):
        (there_shape, _, there), (shape, _, values) = (parts.get(name, "").rpartition(" ") for parts in (base, here))
        if name not in here or name not in base:
            found.append(f"{name} is {'in theirs' if name in base else 'here'} alone")
        elif there_shape != shape:
            found.append(f"{name} was {there_shape}, here {shape}")
        elif there != values:
            found.append(f"{name} has other values")
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"; what differs: {', '.join(found[:_NAMED])}{more}"


def check_continues(edit_set: EditSet, model_id: str, parts: Mapping[str, str], config: EditConfig) -> None:
    """ValueError unless editing can go on from `edit_set` with `config` on this model."""
    check_base(edit_set.model, model_id, edit_set.base, parts)
    for name in (
        "layers",
        "round_robin",
        "other_layers_weight",
        "threshold_relative",
        "threshold_whitened",
        "mom2_update_weight",
        "gate",
        "context_seeds",
        "context_tokens",
        "subject_templates",
    ):
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

    An edit set that the repository held makes way for it; all else there, such as a model, stays.

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
                allow_patterns=[MANIFEST, "*.safetensors"], delete_patterns=_OURS_ON_THE_HUB,
            )
        )  # fmt: skip


# -------------------------------------------------------------------- tensors


def _write_batch(folder: Path, batch: Batch) -> dict[str, str]:
    tensors = {
        f"{position}.{name}": getattr(update, name)
        for position, update in enumerate(batch.layers)
        for name in (*_UPDATE, _SPREAD)
        if getattr(update, name) is not None
    }
    return write_tensors(folder, "batch", tensors)


def _read_batch(folder: Path, line: Mapping[str, Any], layers: int, *, updates: bool) -> Batch:
    return Batch(
        id=line["id"],
        time=line["time"],
        seconds=line["seconds"],
        metrics=line["metrics"],
        outcomes=outcomes_in(line),
        thresholds=thresholds_of(line["thresholds"], layers) if line["thresholds"] else (),
        layers=_read_updates(folder, line, layers) if updates else (),
    )


def _read_updates(folder: Path, line: Mapping[str, Any], layers: int) -> tuple[LayerUpdate, ...]:
    needed = {f"{position}.{name}" for position in range(layers) for name in _UPDATE}
    spreads = {f"{position}.{_SPREAD}" for position in range(layers)}
    tensors = read_tensors(folder, line["tensors"], needed, spreads)
    count = len(line["outcomes"])
    columns, alphas = columns_in(line, layers, count), request_alphas_in(line, layers, count)
    return tuple(
        LayerUpdate(
            keys=tensors[f"{position}.keys"],
            residuals=tensors[f"{position}.residuals"],
            directions=tensors[f"{position}.directions"],
            alpha=alpha_of(alpha),
            spread=tensors.get(f"{position}.{_SPREAD}"),
            requests=columns[position],
            alphas=alphas[position],
        )
        for position, alpha in enumerate(line["alphas"])
    )


def _read_deltas(
    folder: Path, manifest: Mapping[str, Any], sizes: Sequence[tuple[int, int]] | None = None
) -> tuple[LowRankDelta, ...]:
    layers = range(len(manifest["thresholds"]))
    needed = {f"{position}.B" for position in layers}
    others = {f"{position}.{name}" for position in layers for name in ("U", "W")}
    shapes: dict[str, tuple[int | None, int | None]] = {}
    for position, (m, d) in enumerate(sizes or ()):
        shapes |= {f"{position}.U": (m, None), f"{position}.B": (None, d)}
    tensors = read_tensors(folder, manifest["weights"], needed, others, shapes)
    with _named(folder):
        deltas = tuple(
            LowRankDelta.from_state_dict(
                {name: tensors[f"{position}.{name}"] for name in ("U", "B", "W") if f"{position}.{name}" in tensors}
            )
            for position in layers
        )
        check_deltas(deltas)
    return deltas


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What is wrong within names the folder."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder} holds no sound edit set: {error}") from error


# -------------------------------------------------------------------- files


def _sweep(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Removes tensor files that the committed version does not name, and leftovers of killed writers; of other files,
    for edits may lie in a model's folder, none."""
    named = {manifest["weights"]["file"], *(line["tensors"]["file"] for line in manifest["batches"])}
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
