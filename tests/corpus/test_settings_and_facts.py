"""Bad settings, facts, corpora and paths on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import assert_refused
from tiny import tiny_facts, tiny_model, tiny_tokenizer

from coachhook_fast import EditConfig

GOOD = dict(tiny_facts(1)[0])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    tiny_model("llama").save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    (home / "facts.jsonl").write_text(json.dumps(GOOD))
    return home


def edit(home: Path, *more: str) -> list[str]:
    return [
        "edit", "--model", str(home / "model"), "--device", "cpu", "--facts", str(home / "facts.jsonl"),
        "--out", str(home / "never"), *more,
    ]  # fmt: skip


# ------------------------------------------------------------------ settings

_NUMBERS = ("-1", ".nan", ".inf", "-.inf", "text", "[1]", "{a: 1}", "2020-01-01")
_BY_KIND = {
    "int": (*_NUMBERS, "1.5", "true"),
    "float": (*_NUMBERS, "true"),
    "str": ("1", "''", "[x]", "{a: 1}", "true"),
    "bool": ("1", "text", "[true]"),
    "tuple": ("1", "text", "{a: 1}", "[[1]]", "[null]"),
}


def settings() -> Iterator[str]:
    for field in fields(EditConfig):
        kind = next((kind for kind in _BY_KIND if str(field.type).startswith(kind)), "")
        for value in _BY_KIND[kind]:
            yield f"{field.name}={value}"
    yield from ("context_tokens=1000000", "layers=[10000000]", "v_num_grad_steps=1000000000", "rewrite_module_tmp=a{x}")
    yield from (
        "=1",
        "speed=3",
        "layers=[",
        "layers=" + "[" * 5000,
        "v_lr=!!python/object:os.system x",
        "layers",
        "a=b=c",
    )
    yield from ("v_lr=1e999", "alpha=0", "threshold_fpr=1", "short_prefixes=1", "threshold_edit_share=2", "\x1b=\x1b")


@pytest.mark.parametrize("setting", list(settings()))
def test_a_bad_setting(home: Path, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    assert_refused(capsys, home, *edit(home, "--set", setting))


LAYERS = (
    "",
    ",",
    "a",
    "1-",
    "-1",
    "5-a",
    "3-1",
    "0-99999999999",
    "99999999999",
    "1,1",
    "2,1",
    "1.5",
    "9" * 5000,
    "1--2",
)


@pytest.mark.parametrize("layers", LAYERS)
def test_bad_layers(home: Path, capsys: pytest.CaptureFixture[str], layers: str) -> None:
    assert_refused(capsys, home, *edit(home, f"--layers={layers}"))


# ------------------------------------------------------------------ files


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


_FILES: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "FIFO": os.mkfifo,
    "zero": lambda path: path.symlink_to("/dev/zero"),
    "random": lambda path: path.symlink_to("/dev/urandom"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "2 GB": lambda path: _sparse(path, 1 << 31),
    "1 TB": lambda path: _sparse(path, 1 << 40),
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 10),
    "utf-16": lambda path: path.write_bytes(json.dumps(GOOD).encode("utf-16")),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: path.write_text("[1, 2]"),
    "number": lambda path: path.write_text("1"),
    "null": lambda path: path.write_text("null"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "deep object": lambda path: path.write_text('{"a":' * 100_000),
}
_NO_CORPUS = ("nothing", "folder", "FIFO", "zero", "random", "link to itself", "bytes", "utf-16", "empty")
CASES = [(argument, name) for argument in ("--facts", "--config") for name in _FILES]
CASES += [("--corpus", name) for name in _NO_CORPUS]


@pytest.mark.parametrize(("argument", "name"), CASES)
def test_a_bad_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, name: str) -> None:
    path = tmp_path / "file"
    _FILES[name](path)
    line = assert_refused(capsys, tmp_path, *edit(home, "--layers", "1,2", argument, str(path)))
    assert str(path) in line
    assert not (home / "never").exists()


# ------------------------------------------------------------------ facts


def facts() -> Iterator[Any]:
    for name in ("prompt", "subject", "target_new"):
        for value in (None, 1, "", " ", [], {}, {"a": 1}, True, 1.5):
            yield {**GOOD, name: value}
        yield {other: GOOD[other] for other in GOOD if other != name}
    yield {**GOOD, "prompt": "{} {}"}
    yield {**GOOD, "subject": "who does not stand there", "prompt": "Nobody is"}
    yield {**GOOD, "prompt": "word " * 4000 + "{}"}
    yield from ([], {}, None, 1, "text", [[]], [None])


@pytest.mark.parametrize("fact", list(facts()), ids=lambda fact: json.dumps(fact)[:60])
def test_a_bad_fact(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fact: Any) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(fact))
    assert_refused(capsys, tmp_path, *edit(home, "--layers", "1,2", "--facts", str(path)))
    assert not (home / "never").exists()
