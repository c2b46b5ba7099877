"""Reading published records: files of JSON or JSON lines, fields whose absence is named, answers with aliases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Fields = dict[str, Any]
Asked = tuple[str, str | None, str | None]  # prompt, answer, kind


class MissingField(Exception):
    """The field named by str(self) is not in the record."""


def load(path: Path) -> list[Any]:
    """The raw records of a JSON list, a single JSON object or JSON lines.

    Raises:
        ValueError: the file is no JSON, no UTF-8 text or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] != "{":
            raise ValueError(f"{path} is neither JSON nor JSON lines: {error}") from None
        whole = list(_load_lines(path, text))
    records = whole if isinstance(whole, list) else [whole]
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def _load_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


@contextmanager
def naming(path: Path, index: int, fields: Any) -> Iterator[None]:
    """Errors within name the file, the record and, where one is missing, the field."""
    where = f"{path}, record {index}"
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be an object, got {type(fields).__name__}")
    try:
        yield
    except MissingField as missing:
        raise ValueError(f"{where}: field {missing} is missing; it has {sorted(fields)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def get(fields: Fields, name: str, path: str = "") -> Any:
    if name not in fields:
        raise MissingField(f"{path}{name}")
    return fields[name]


def text(value: Any, name: str) -> str:
    """A text, the first of a (nested) list of aliases, or `value["str"]`."""
    while isinstance(value, (list, dict)) and value:
        if isinstance(value, dict):
            value = get(value, "str", f"{name}.")
        else:
            value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")
    return value


def optional_text(fields: Fields, name: str) -> str | None:
    """None where the field is absent or null."""
    value = fields.get(name)
    return None if value is None else text(value, name)


def texts(value: Any, name: str) -> tuple[str, ...]:
    """One text or a list of them."""
    return tuple(text(one, name) for one in value) if isinstance(value, list) else (text(value, name),)


def asked(prompt: Any, answer: Any, name: str, kind: str | None = None) -> list[Asked]:
    """A prompt and its answer, or a list of prompts and as many answers (entries may be null)."""
    prompts = texts(prompt, name)
    if not isinstance(prompt, list):
        return [(prompts[0], text(answer, name), kind)]
    if not isinstance(answer, list) or len(answer) != len(prompts):
        raise ValueError(f"the {len(prompts)} prompts of {name} need as many answers, got {answer!r}")
    answers = [None if one is None else text(one, name) for one in answer]
    return [(one, other, kind) for one, other in zip(prompts, answers, strict=True)]


def asked_in_groups(groups: Any, name: str) -> list[Asked]:
    """KnowEdit's and EasyEdit's nested form: `{kind: [{"prompt": ..., "ground_truth": ...}]}`, lists within or not."""
    if not isinstance(groups, dict):
        raise TypeError(f"{name} must be an object of groups, got {type(groups).__name__}")
    found: list[Asked] = []
    for group, entries in groups.items():
        where = f"{name}.{group}"
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                raise TypeError(f"{where} must hold objects with 'prompt' and 'ground_truth', got {entry!r}")
            found += asked(get(entry, "prompt", f"{where}."), get(entry, "ground_truth", f"{where}."), where, group)
    return found


def asked_in_list(entries: Any, name: str, kind: str) -> list[tuple[str, str, str | None]]:
    """Our form: `[{"prompt": ..., "answer": ..., kind: ...}]`; `kind` names a field that may be absent or null."""
    if not isinstance(entries, list):
        raise TypeError(f"{name} must be a list of objects with 'prompt' and 'answer', got {type(entries).__name__}")
    found = []
    for index, entry in enumerate(entries):
        where = f"{name}[{index}]"
        if not isinstance(entry, dict):
            raise TypeError(f"{where} must be an object with 'prompt' and 'answer', got {entry!r}")
        prompt, answer = (text(get(entry, one, f"{where}."), f"{where}.{one}") for one in ("prompt", "answer"))
        found.append((prompt, answer, optional_text(entry, kind)))
    return found
