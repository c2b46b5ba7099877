"""Bad edit sets: every value of a manifest in a wrong way, every tensor, every kind of file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import assert_refused
from safetensors.torch import save as to_bytes
from store_cases import edit_set, tensors_of, with_tensors

from coachhook_fast import EditConfig, EditRequest
from coachhook_fast.edits import store
from coachhook_fast.edits.edit_set import Removed
from coachhook_fast.edits.manifest import MANIFEST

Case = tuple[str, Callable[[Path], None]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    edits = edit_set(2)
    removed = Removed(**{**_REMOVED, "request": EditRequest(**_REMOVED["request"])})
    store.save(edits.with_removed([removed]), folder)
    return folder


# ------------------------------------------------------------------ manifests

_BATCH, _OUTCOME = ("batches", 0), ("batches", 0, "outcomes", 0)
_REQUEST = (*_OUTCOME, "request")
_CONFIG = ("config",)
_HUGE, _DEEP = 10**400, json.loads("[" * 500 + "]" * 500)
_REMOVED: dict[str, Any] = {
    "batch": "batch0000", "index": 2, "edited": "2025-01-01T00:00:00+00:00", "time": "2025-01-02T00:00:00+00:00",
    "reason": "removed", "by": "",
    "request": {"prompt": "{} is", "subject": "Ann 0", "target_new": "red"},
}  # fmt: skip
_WRONG: dict[tuple[Any, ...], list[Any]] = {
    ("format",): [None, 0, 2, "1", 1.5, [], {}, _HUGE],
    ("model",): [None, 1, [], {}, True],
    ("config",): [None, 1, "x", [], [1], {"surprise": 1}, {"layers": [1, 2], "\x1b": 1}],
    ("contexts",): [None, 1, "x", {"a": 1}, [1], [None], [["x"]]],
    ("thresholds",): [None, 1, "x", {}, [], [[1, 1, 1]], [[1], [1]], [None, None], ["abc", "abc"], [_DEEP, _DEEP]],
    ("thresholds", 0): [None, 1, [], [1, 2], [1, 2, 3, 4], ["1", None, None], [[1], None, None], [True, None, None],
                        [-1, None, None], [0, None, None], [1e-320, None, None], [1e308, None, None],
                        [_HUGE, None, None], [1, None, 0], [1, None, -1], [1, "0", 1], [1, None, _HUGE]],
    ("weights",): [None, 1, "x", [], {}, {"file": 1, "sha256": 1}],
    ("weights", "file"): [None, 1, "", ".", "..", "/etc/passwd", "../x", "x\0y", "a/b", MANIFEST, ".lock",
                          "weights-0123456789abcdef.safetensors", "batch-0123456789abcdef.safetensors",
                          "weights-0123456789ABCDEF.safetensors", "weights-" + "0" * 5000 + ".safetensors"],
    ("weights", "sha256"): [None, 1, "", "0" * 63, "0" * 64, "g" * 64, "\x1b" * 64],
    ("statistics",): [None, 1, [], "/etc/passwd", "../x", "a b", "x" * 65, "\x1b[2J", "é"],
    ("base",): [None, 1, [], "x", {"a": 1}, {"a": None}],
    ("batches",): [None, 1, "x", {}, {"a": 1}, [1], [None], [[]], [{}]],
    (*_BATCH, "id"): [None, 1, "", [], {}, "other", "\x1b"],
    (*_BATCH, "parent"): ["x", 1, [], {}, "batch0001", ""],
    (*_BATCH, "time"): [None, 1, [], {}],
    (*_BATCH, "seconds"): [None, "1", [], {}, _HUGE],
    (*_BATCH, "metrics"): [None, 1, "x", []],
    (*_BATCH, "alphas"): [None, 1, "xy", [], [1], [1, 2, 3], ["1", "2"], [[], []], [True, True]],
    (*_BATCH, "thresholds"): [None, 1, "x", {}, [1], [[1, 1, 1]], [[0, 1, 1], [1, 1, 1]]],
    (*_BATCH, "outcomes"): [None, 1, "x", {}, [1], [None], [{}]],
    (*_BATCH, "tensors"): [None, 1, [], {}, "x"],
    (*_OUTCOME, "loss"): [None, "x", [], {}, _HUGE],
    (*_OUTCOME, "steps"): [None, "x", [], {}],
    (*_OUTCOME, "leverage"): [None, 1, ["x"], [None], [[1]], [_HUGE]],
    (*_OUTCOME, "residual_left"): [None, "x", [], {}, _HUGE],
    (*_BATCH, "columns"): [1, "x", {}, [], [None], [[0, 1]], [[0, 1], "01"], [[0, 1], [0]], [[0, 0], [0, 1]],
                           [[0, 1, 2], [0, 1]], [[0, True], [0, 1]], [[0.0, 1], [0, 1]], [[0, -1], [0, 1]]],
    (*_BATCH, "request_alphas"): [None, 1, "xy", {}, [], [[]], [[1], [1]], [[1, 2, 3], []], [["1", "2"], []], [1, 2]],
    ("removed",): [None, 1, "x", {}, [1], [[]], [{}], [{"batch": "batch0000"}], [_REMOVED, _REMOVED],
                   [{**_REMOVED, "index": 9}], [{**_REMOVED, "surprise": 1}]],
    ("removed", 0): [{**_REMOVED, name: value} for name, value in (
        ("batch", 1), ("index", -1), ("index", True), ("index", 1.5), ("index", "0"), ("edited", None), ("time", 1),
        ("reason", "x"), ("reason", None), ("by", None), ("request", None), ("request", {}),
        ("request", {"prompt": "x"}),
    )],
    _REQUEST: [None, 1, "x", [], {}, {"prompt": "x"}, {"surprise": 1}],
    (*_REQUEST, "prompt"): [None, 1, [], "", " ", "{} {}", "without"],
    (*_REQUEST, "subject"): [None, 1, [], "", "\n"],
    (*_REQUEST, "target_new"): [None, 1, [], "", " \t"],
    (*_REQUEST, "ground_truth"): [1, [], {}],
    (*_REQUEST, "case_id"): [[], {}, {"a": 1}, 1.5, _DEEP],
    **{(*_CONFIG, field.name): [{"a": 1}] for field in fields(EditConfig)},
    (*_CONFIG, "layers"): [None, [], [2, 1], [1, 1], [-1, 2], [1.5, 2], ["1", "2"], [1], [1, 2, 3], [1, 10_000_000], 1],
    (*_CONFIG, "context_tokens"): [0, -1, 1.5, True, 10**6, _HUGE],
    (*_CONFIG, "context_seeds"): ["The", [""], [1], ["x"] * 2000],
    (*_CONFIG, "subject_templates"): ["{}", ["{} {}"], ["x"], [1], ["{}"] * 2000],
    (*_CONFIG, "rewrite_module_tmp"): ["", "x", "{}{}", "{0}", "{x}", "{}.{0.__class__}", "{}}", 1],
    (*_CONFIG, "layer_module_tmp"): ["", "x", "{}{}", "{!r}", "{:>99999999999}", 1],
    (*_CONFIG, "gate"): ["", "none", 1, None],
    (*_CONFIG, "threshold_rule"): ["", "none", 1, None],
}  # fmt: skip
_MAY_LACK = {"statistics", "base", "case_id", "ground_truth", "in_context_only"}
_MAY_LACK |= {"paraphrases", "keep", "said", "answer", "said_paraphrases"}  # not in sets of earlier versions
_MAY_LACK |= {"columns", "request_alphas", "removed"}


def _without(manifest: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for path in ((), ("weights",), _BATCH, (*_BATCH, "tensors"), _OUTCOME, _REQUEST):
        yield from ((*path, name) for name in _at(manifest, path) if name not in _MAY_LACK)


def _at(manifest: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def _change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _setting(path: tuple[Any, ...], value: Any) -> Callable[[Path], None]:
    return lambda folder: _change(folder, lambda m: _at(m, path[:-1]).__setitem__(path[-1], value))


def _raw(edit: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = edit((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_bytes(found.encode() if isinstance(found, str) else found)

    return write


def manifests() -> Iterator[Case]:
    for path, values in _WRONG.items():
        for number, value in enumerate(values):
            yield f"{'.'.join(map(str, path))} {number}", _setting(path, value)
    for level in ((), ("weights",), _BATCH, _OUTCOME, _REQUEST, _CONFIG):
        yield f"unknown in {level}", _setting((*level, "surprise"), 1)
    for part in range(20):
        yield f"cut {part}", _raw(lambda text, part=part: text[: len(text) * part // 20])  # type: ignore[misc]
    for name in ("format", "model", "config", "contexts", "thresholds", "weights", "batches"):
        yield f"{name} twice", _raw(lambda text, name=name: text.replace("{", f'{{"{name}": 1, ', 1))  # type: ignore[misc]
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "1" * 5000, "0x1", "01", "+1", "1."):
        yield (
            f"number {number[:9]}",
            _raw(
                lambda text, number=number: text.replace('"seconds": 1.5', f'"seconds": {number}', 1)  # type: ignore[misc]
            ),
        )
    raw: list[Callable[[str], str | bytes]] = [
        lambda text: b"\xff" + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text + "x",
        lambda text: text + text,
        lambda text: text.replace('"', "'"),
        lambda text: "[" * 100_000,
        lambda text: '{"a":' * 100_000,
        lambda text: b"\0" * 1000,
        lambda text: "null",
        lambda text: "[]",
        lambda text: '"text"',
        lambda text: "1",
    ]
    yield from ((f"raw {number}", _raw(edit)) for number, edit in enumerate(raw))


# ------------------------------------------------------------------ tensors


def _exchanging(kind: str, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: with_tensors(folder, kind, edit(tensors_of(folder, kind)))


def _with_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    def edit(tensors: dict[str, torch.Tensor]) -> Any:
        tensors[name].view(-1)[-1] = value
        return tensors

    return edit


_NAMES = {
    "weights": ["0.U", "0.B", "1.U", "1.B"],
    "batch": [f"{layer}.{name}" for layer in (0, 1) for name in ("keys", "residuals", "directions")],
}


def tensors() -> Iterator[Case]:
    for kind, names in _NAMES.items():
        for name in names:
            for value in (float("nan"), float("inf"), -float("inf"), 1e30, -1e20):
                yield f"{name} {value}", _exchanging(kind, _with_value(name, value))
            edits: list[Callable[[torch.Tensor], torch.Tensor]] = [
                lambda t: t[:-1].clone(), lambda t: t[:, :-1].clone(), lambda t: t.T.contiguous(), lambda t: t[0],
                lambda t: t[None].clone(), lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.to(torch.int32),
                lambda t: t.to(torch.float8_e5m2), lambda t: t.bool(), lambda t: t * 3,
                lambda t: torch.zeros(0, 0, dtype=t.dtype),
            ]  # fmt: skip
            for number, edit in enumerate(edits):
                if name.endswith("keys") and number in (1, 2, 10):
                    continue  # fewer or other keys are of a batch's own making
                yield (
                    f"{name} edit {number}",
                    _exchanging(
                        kind,
                        lambda t, name=name, edit=edit: {**t, name: edit(t[name])},  # type: ignore[misc]
                    ),
                )
            yield (
                f"{name} gone",
                _exchanging(
                    kind,
                    lambda t, name=name: {other: t[other] for other in t if other != name},  # type: ignore[misc]
                ),
            )
        yield f"{kind} unknown", _exchanging(kind, lambda t: {**t, "0.pickle": torch.zeros(1, 1)})
        yield f"{kind} empty", _exchanging(kind, lambda t: b"")
        for part in range(10):
            yield (
                f"{kind} cut {part}",
                _exchanging(
                    kind,
                    lambda t, part=part: to_bytes(t)[: len(to_bytes(t)) * part // 10],  # type: ignore[misc]
                ),
            )
        yield f"{kind} longer", _exchanging(kind, lambda t: to_bytes(t) + b"\0" * 8)


# ------------------------------------------------------------------ kinds of files


def _instead(pattern: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def exchange(folder: Path) -> None:
        victim = next(folder.glob(pattern))
        victim.rename(folder.parent / "outside")
        make(victim)

    return exchange


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def kinds() -> Iterator[Case]:
    makers: dict[str, Callable[[Path], Any]] = {
        "nothing": lambda path: None,
        "folder": lambda path: path.mkdir(),
        "FIFO": os.mkfifo,
        "link out": lambda path: path.symlink_to("../outside"),
        "link to zero": lambda path: path.symlink_to("/dev/zero"),
        "link to random": lambda path: path.symlink_to("/dev/urandom"),
        "link to stdin": lambda path: path.symlink_to("/dev/stdin"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "empty": lambda path: path.write_bytes(b""),
        "2 GB": lambda path: _sparse(path, 1 << 31),
        "1 TB": lambda path: _sparse(path, 1 << 40),
    }
    for pattern in (MANIFEST, "weights-*", "batch-*"):
        yield from ((f"{pattern} {name}", _instead(pattern, make)) for name, make in makers.items())


CASES = [*manifests(), *tensors(), *kinds()]


@pytest.mark.filterwarnings("ignore:settings by former names:FutureWarning")
@pytest.mark.parametrize("build", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_edit_set(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], build: Callable[[Path], None]
) -> None:
    folder = tmp_path / "edits"
    shutil.copytree(whole, folder)
    build(folder)
    line = assert_refused(capsys, tmp_path, "verify-edits", str(folder))
    assert str(folder) in line


def test_every_field_is_needed(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    lacking = list(_without(manifest))
    assert len(lacking) >= 25
    for number, path in enumerate(lacking):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        _change(folder, lambda m, path=path: _at(m, path[:-1]).pop(path[-1]))  # type: ignore[misc]
        assert str(folder) in assert_refused(capsys, folder, "verify-edits", str(folder))


def test_there_are_hundreds() -> None:
    assert len(CASES) > 400
