"""The JSON part of an edit set on disk: settings, thresholds and the ledger, read with every value checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coachhook_fast import files
from coachhook_fast.config import EditConfig, current_names
from coachhook_fast.edits.edit_set import REASONS, Batch, EditOutcome, Removed
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.limits import check_bounds
from coachhook_fast.request import EditRequest

FORMAT = 1
MANIFEST = "edit_set.json"
State = tuple[tuple[str, str], ...]
RUN_NAME = "[0-9A-Za-z_-]{0,64}"  # of key statistics: a name in the cache, never a path
_LEAST, _MOST = 2.0**-126, 2.0**127  # numbers that fp32 holds in full
_FIELDS = {"format", "model", "config", "contexts", "thresholds", "weights", "batches"}
_NEWER_FIELDS = {"statistics", "removed", "base"}  # sets written before they were there lack them
_BATCH_KINDS: dict[str, Any] = {
    "id": str, "parent": (str, type(None)), "time": str, "seconds": (int, float), "metrics": dict,
    "alphas": list, "thresholds": list, "outcomes": list, "tensors": dict,
}  # fmt: skip
_NEWER_BATCH_FIELDS = {"columns", "request_alphas"}
_REMOVED_KINDS: dict[str, Any] = {
    "batch": str, "index": int, "edited": str, "request": dict, "time": str, "reason": str, "by": str,
}  # fmt: skip


def stands_in(folder: Path) -> bool:
    """Whether `folder` holds an edit set, or anything in the place of its manifest, which `read_manifest` refuses by
    name; False where the edit set is yet to be made.

    Raises:
        ValueError: it is no folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return os.path.lexists(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`: enough to list a ledger without a model.

    Raises:
        ValueError: there is none; it is no JSON, of another format, or changed by hand into what this version cannot
            read. The message names the file.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"folder {str(folder)!r} holds no edit set: it has no {MANIFEST}")
    text = _text(path)
    try:
        manifest = files.parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ValueError(f"{path} has format {found!r}, this version reads {FORMAT}")
    try:
        manifest["config"] = current_names(manifest["config"])
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is not as an edit set is written: {type(error).__name__}: {error}") from error
    return manifest


def committed_state(folder: Path) -> tuple[State, State]:
    """`state_of_manifest` of what `folder` holds, without a look at the rest; ValueError where it is none."""
    path = folder / MANIFEST
    try:
        return state_of_manifest(files.parse_json(_text(path)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read, so nothing is saved over it: {error}") from error


def state_of_manifest(manifest: Mapping[str, Any]) -> tuple[State, State]:
    """What tells versions of an edit set apart: (id and facts) of each batch, and what was removed, in order. A batch
    keeps its id when it loses a request, so its id alone would not tell."""
    batches = tuple(
        (str(line["id"]), _digest([outcome["request"] for outcome in line["outcomes"]])) for line in manifest["batches"]
    )
    removed = tuple((str(line["batch"]), str(line["index"])) for line in manifest.get("removed", ()))
    return batches, removed


def _digest(requests: Sequence[Mapping[str, Any]]) -> str:
    facts = [[request[name] for name in ("prompt", "subject", "target_new")] for request in requests]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _text(path: Path) -> str:
    return files.read_text(path, most=files.MOST_JSON, within=path.parent)


def _check(manifest: Mapping[str, Any]) -> None:
    if set(manifest) - _NEWER_FIELDS != _FIELDS:
        raise ValueError(f"it has the fields {sorted(manifest)}, expected {sorted(_FIELDS)}")
    contexts = manifest["contexts"]
    if not isinstance(manifest["model"], str) or not isinstance(contexts, list) or not all(map(_is_text, contexts)):
        raise TypeError(f"model is {manifest['model']!r} and contexts are {contexts!r}")
    run = manifest.get("statistics", "")
    if not isinstance(run, str) or not re.fullmatch(RUN_NAME, run):
        raise ValueError(f"statistics must be the name of a run, got {run!r}")
    if not isinstance(manifest["batches"], list):
        raise TypeError(f"batches must be a list, got {manifest['batches']!r}")
    base = manifest.get("base", {})
    if not isinstance(base, dict) or not all(isinstance(part, str) for part in base.values()):
        raise TypeError(f"base must tell of each parameter in a text, got {base!r}")
    config = EditConfig.from_dict(manifest["config"])
    check_bounds(config)
    layers = config.layers
    if layers is None:
        raise ValueError("config names no layers")
    thresholds_of(manifest["thresholds"], len(layers))
    _check_file(manifest["weights"], "weights")
    parent = None
    seen: set[str] = set()
    for line in manifest["batches"]:
        if set(line) - _NEWER_BATCH_FIELDS != set(_BATCH_KINDS):
            raise ValueError(f"a ledger line has the fields {sorted(line)}, expected {sorted(_BATCH_KINDS)}")
        for name, kind in _BATCH_KINDS.items():
            if not isinstance(line[name], kind):
                raise TypeError(f"{name} of batch {line['id']!r} is {line[name]!r}")
        if line["parent"] != parent:
            raise ValueError(f"the ledger is broken: batch {line['id']!r} does not follow {parent!r}")
        parent = line["id"]
        if not parent or parent in seen:
            raise ValueError(f"the ledger is broken: the batch id {parent!r} is {'there twice' if parent else 'empty'}")
        seen.add(parent)
        if not math.isfinite(line["seconds"]):
            raise ValueError(f"seconds of batch {parent!r} is {line['seconds']}")
        if line["thresholds"]:
            thresholds_of(line["thresholds"], len(layers))
        if len(line["alphas"]) != len(layers):
            raise ValueError(f"batch {parent!r} has alphas {line['alphas']} for layers {layers}")
        for alpha in line["alphas"]:
            alpha_of(alpha)
        count = len(outcomes_in(line))
        columns_in(line, len(layers), count)
        request_alphas_in(line, len(layers), count)
        _check_file(line["tensors"], "batch")
    removed_in(manifest)


def _check_file(entry: Mapping[str, Any], kind: str) -> None:
    if set(entry) != {"file", "sha256"}:
        raise ValueError(f"a tensor file is named by {entry!r}")
    name, digest = entry["file"], entry["sha256"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"a tensor file has sha256 {digest!r}")
    if not isinstance(name, str) or not re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.safetensors", name):
        raise ValueError(f"a tensor file is called {name!r}, not {kind}-<16 hex digits>.safetensors")


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def to_json(manifest: Mapping[str, Any]) -> bytes:
    """What `read_manifest` reads; ValueError where it would not, so that nothing is committed that stays unread."""
    try:
        _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"the edit set cannot be saved: {error}") from error
    try:
        content = json.dumps(manifest, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the edit set holds what JSON cannot: {error}") from error
    if len(content) > files.MOST_JSON:
        raise ValueError(f"{MANIFEST} would have {len(content)} bytes, at most {files.MOST_JSON} are read")
    return content


def version_of(manifest: Mapping[str, Any]) -> str:
    """Names what an edit set serves: 12 hex digits over deltas, thresholds and what these are compared with."""
    served = json.dumps([manifest["weights"]["sha256"], manifest["thresholds"]])
    if manifest["config"].get("threshold_relative"):  # sets without keep their names
        served += "relative"
    return hashlib.sha256(served.encode()).hexdigest()[:12]


def batch_line(batch: Batch, parent: str | None, tensors: Mapping[str, str]) -> dict[str, Any]:
    """The ledger line of `batch`, whose tensors are in the file `tensors`."""
    return {
        "id": batch.id,
        "parent": parent,
        "time": batch.time,
        "seconds": batch.seconds,
        "metrics": batch.metrics,
        "alphas": [_number(update.alpha) for update in batch.layers],
        "columns": [None if update.requests is None else list(update.requests) for update in batch.layers],
        "request_alphas": [[_number(alpha) for alpha in update.alphas] for update in batch.layers],
        "thresholds": thresholds_line(batch.thresholds),
        "outcomes": [asdict(outcome) for outcome in batch.outcomes],
        "tensors": tensors,
    }


def outcomes_in(line: Mapping[str, Any]) -> tuple[EditOutcome, ...]:
    """The outcomes in a ledger line; earlier versions called the leverage strength."""
    known = {*EditOutcome.__dataclass_fields__, "strength"}
    for outcome in line["outcomes"]:
        if unknown := sorted(set(outcome) - known):
            raise ValueError(f"an outcome in the ledger has unknown fields {unknown}")
    return tuple(
        EditOutcome(
            request=_request_of(outcome["request"]),
            loss=float(outcome["loss"]),
            steps=int(outcome["steps"]),
            leverage=tuple(map(float, outcome["leverage" if "leverage" in outcome else "strength"])),
            residual_left=float(outcome["residual_left"]),
            in_context_only=bool(outcome.get("in_context_only", False)),
            said=outcome.get("said"),
            answer=str(outcome.get("answer", "")),
            said_paraphrases=outcome.get("said_paraphrases"),
        )
        for outcome in line["outcomes"]
    )


def columns_in(line: Mapping[str, Any], layers: int, count: int) -> list[tuple[int, ...] | None]:
    """`LayerUpdate.requests` of each of `layers` layers in the ledger line of a batch of `count` requests; ValueError
    where one does not name every request once."""
    found = line.get("columns", [None] * layers)
    if not isinstance(found, list) or len(found) != layers:
        raise ValueError(f"batch {line['id']!r} has columns {found!r} for {layers} layers")
    for columns in found:
        if columns is None:
            continue
        if not isinstance(columns, list) or any(type(each) is not int for each in columns):
            raise TypeError(f"batch {line['id']!r} has columns {columns!r}, expected numbers of requests")
        if sorted(columns) != list(range(count)):
            raise ValueError(f"batch {line['id']!r} has columns {columns} for {count} requests")
    return [None if columns is None else tuple(columns) for columns in found]


def request_alphas_in(line: Mapping[str, Any], layers: int, count: int) -> list[tuple[float, ...]]:
    """`LayerUpdate.alphas` of each layer in a ledger line; ValueError where there are more or fewer than requests."""
    found = line.get("request_alphas", [[]] * layers)
    if not isinstance(found, list) or len(found) != layers or not all(isinstance(alphas, list) for alphas in found):
        raise ValueError(f"batch {line['id']!r} has request_alphas {found!r} for {layers} layers")
    if wrong := [alphas for alphas in found if len(alphas) not in (0, count)]:
        raise ValueError(f"batch {line['id']!r} has request_alphas {wrong[0]} for {count} requests")
    return [tuple(map(alpha_of, alphas)) for alphas in found]


def numbers_in(line: Mapping[str, Any], removed: Sequence[Mapping[str, Any]]) -> list[int]:
    """The number of each outcome in the ledger line of a batch, see `EditSet.numbers`."""
    gone = {one["index"] for one in removed if one["batch"] == line["id"]}
    return [number for number in range(len(line["outcomes"]) + len(gone)) if number not in gone]


def removed_line(removed: Removed) -> dict[str, Any]:
    return asdict(removed)


def removed_in(manifest: Mapping[str, Any]) -> tuple[Removed, ...]:
    """What a manifest says was taken out of the ledger; ValueError or TypeError where no editor writes that."""
    lines = manifest.get("removed", [])
    if not isinstance(lines, list):
        raise TypeError(f"removed is {lines!r}, expected a list")
    left = {line["id"]: len(line["outcomes"]) for line in manifest["batches"]}
    gone: dict[str, set[int]] = {}
    found = []
    for line in lines:
        if not isinstance(line, dict) or set(line) != set(_REMOVED_KINDS):
            raise ValueError(f"a removed request is {line!r}, expected the fields {sorted(_REMOVED_KINDS)}")
        for name, kind in _REMOVED_KINDS.items():
            if type(line[name]) is not kind:
                raise TypeError(f"{name} of a removed request is {line[name]!r}")
        if line["reason"] not in REASONS:
            raise ValueError(f"reason of a removed request must be one of {REASONS}, got {line['reason']!r}")
        numbers = gone.setdefault(line["batch"], set())
        if line["index"] < 0 or line["index"] in numbers:
            raise ValueError(f"request {line['index']} of batch {line['batch']!r} cannot have been removed (twice)")
        numbers.add(line["index"])
        found.append(Removed(**{**line, "request": _request_of(line["request"])}))
    for batch, numbers in gone.items():
        if batch in left and max(numbers) >= left[batch] + len(numbers):
            raise ValueError(f"batch {batch!r} had no request {max(numbers)} to remove")
    return tuple(found)


def _request_of(fields: Mapping[str, Any]) -> EditRequest:
    unknown = sorted(set(fields) - set(EditRequest.__dataclass_fields__))
    if unknown:
        raise ValueError(f"a request in the ledger has unknown fields {unknown}")
    case = fields.get("case_id")
    if not isinstance(case, (str, int, type(None))):
        raise TypeError(f"case_id must be a number or text, got {case!r}")
    return EditRequest(**fields)


def thresholds_line(thresholds: Sequence[Threshold]) -> list[list[float | None]]:
    return [[_number(each.value), _number(each.mean), _number(each.std)] for each in thresholds]


def thresholds_of(line: Sequence[Sequence[float | None]], layers: int) -> tuple[Threshold, ...]:
    """The thresholds of `layers` layers; ValueError where there are more or fewer."""
    if len(line) != layers:
        raise ValueError(f"there are {len(line)} thresholds for {layers} layers")
    found = []
    for value, mean, std in line:
        found.append(Threshold(_back(value, math.inf), _back(mean, math.nan), _back(std, math.nan)))
        if not (_LEAST <= found[-1].value <= _MOST or value is None):
            raise ValueError(f"a threshold must be positive and a number in fp32, got {value}")
        if std is not None and not _LEAST <= std <= _MOST:
            raise ValueError(f"a threshold's std must be positive, got {std}")
    return tuple(found)


def alpha_of(value: float | None) -> float:
    return _back(value, math.inf)


def _number(value: float) -> float | None:
    """JSON has no infinity or NaN."""
    return value if math.isfinite(value) else None


def _back(value: float | None, absent: float) -> float:
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return value
