"""Facts to edit and to judge an edit by, read from the formats the field uses.

`read_records` recognises a file by the fields of its first record:

- ROME and MEMIT CounterFact (`requested_rewrite`): `target_new.str` replaces `target_true.str`;
  `paraphrase_prompts`, `neighborhood_prompts`.
- ZsRE in MEND's form (`src`, `alt`): `alt` replaces `answers[0]`; `rephrase`; `loc` without its "nq question:
  " and `loc_ans`.
- Known facts (`attribute`): the attribute is the new and the old answer.
- EasyEdit CounterFact, KnowEdit and our own JSONL (`prompt`): `target_new` replaces `ground_truth`;
  `rephrase_prompt` or a list `rephrase_prompts`; `locality_prompt` with `locality_ground_truth`, lists
  `locality_prompts` with `locality_answers` (optional, entries may be null), or EasyEdit's nested `locality`.
  Portability is not read.

A file is a JSON list of records, one JSON record, or JSON lines. A neighbour is a prompt whose answer must
not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coachhook_fast.request import EditRequest

Fields = dict[str, Any]
Neighbours = tuple[tuple[str, ...], tuple[str | None, ...]]  # prompts, answers

_ZSRE_LOCALITY_PREFIX = "nq question: "


@dataclass(frozen=True)
class EditRecord:
    """One edit and the prompts that judge it.

    Attributes:
        request: the edit.
        rephrase_prompts: other wordings that must give `request.target_new` too.
        locality_prompts: neighbours, whose answers must stay as they were.
        locality_answers: what follows each neighbour; None where the file does not say.

    Raises:
        ValueError: the neighbours and their answers differ in number, or a prompt is empty.
    """

    request: EditRequest
    rephrase_prompts: tuple[str, ...] = ()
    locality_prompts: tuple[str, ...] = ()
    locality_answers: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.locality_prompts) != len(self.locality_answers):
            raise ValueError(
                f"locality_answers must have one entry (or null) a prompt: {len(self.locality_prompts)} "
                f"locality_prompts, got {len(self.locality_answers)}"
            )
        for name in ("rephrase_prompts", "locality_prompts"):
            for text in getattr(self, name):
                if not text.strip():
                    raise ValueError(f"{name} holds an empty prompt: {getattr(self, name)!r}")


def read_records(path: str | Path, *, limit: int | None = None, skipped: list[str] | None = None) -> list[EditRecord]:
    """Reads the records of `path`, in the file's order.

    Args:
        path: the file; see the module's table for the formats.
        limit: stop after this many records.
        skipped: None raises at a record that is no valid edit (its subject does not stand in its prompt, its
            target is empty). A list collects the message of each such record instead, and the record is left
            out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, empty or of no known format; a record lacks a field or, with
        `skipped` None, is no valid edit. The message names the file, the record's index and the field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    raw = _load(path)
    if not raw:
        raise ValueError(f"{path} holds no records")
    read = _recognise(raw[0], path)
    records: list[EditRecord] = []
    for index, fields in enumerate(raw):
        if len(records) == limit:
            break
        where = f"{path}, record {index}"
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be an object, got {type(fields).__name__}")
        try:
            arguments, rephrases, (neighbours, answers) = read(fields)
        except _MissingField as missing:
            raise ValueError(f"{where}: field {missing} is missing; it has {sorted(fields)}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        arguments.setdefault("case_id", fields.get("case_id", fields.get("known_id", index)))
        try:
            records.append(EditRecord(EditRequest(**arguments), rephrases, neighbours, answers))
        except (TypeError, ValueError) as error:
            if skipped is None:
                raise ValueError(f"{where}: {error}") from None
            skipped.append(f"record {index}: {error}")
    return records


class _MissingField(Exception):
    """The field named by str(self) is not in the record."""


def _load(path: Path) -> list[Any]:
    """The raw records of a JSON list, a single JSON object or JSON lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip()[:1] != "{":
            raise ValueError(f"{path} is neither JSON nor JSON lines: {error}") from None
        return list(_load_lines(path, text))
    return whole if isinstance(whole, list) else [whole]


def _load_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


Reader = Callable[[Fields], tuple[dict[str, Any], tuple[str, ...], Neighbours]]


def _recognise(first: Any, path: Path) -> Reader:
    readers: tuple[tuple[set[str], Reader], ...] = (
        ({"requested_rewrite"}, _read_rome),
        ({"src", "alt"}, _read_zsre),
        ({"attribute"}, _read_known),
        ({"prompt"}, _read_flat),
    )
    fields = set(first) if isinstance(first, dict) else set()
    for marks, reader in readers:
        if marks & fields:
            return reader
    raise ValueError(
        f"{path}, record 0 is of no known format, it has {sorted(fields) or type(first).__name__}; it needs "
        "'requested_rewrite' (ROME, MEMIT), 'src' and 'alt' (ZsRE), 'attribute' (known facts) or 'prompt' "
        "(EasyEdit, ours)"
    )


def _read_rome(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...], Neighbours]:
    rewrite = _get(fields, "requested_rewrite")
    if not isinstance(rewrite, dict):
        raise TypeError(f"requested_rewrite must be an object, got {rewrite!r}")
    truth = _text(_get(rewrite, "target_true", "requested_rewrite."), "requested_rewrite.target_true")
    arguments = {
        "prompt": _get(rewrite, "prompt", "requested_rewrite."),
        "subject": _get(rewrite, "subject", "requested_rewrite."),
        "target_new": _text(_get(rewrite, "target_new", "requested_rewrite."), "requested_rewrite.target_new"),
        "ground_truth": truth,
    }
    neighbours = _texts(_get(fields, "neighborhood_prompts"), "neighborhood_prompts")
    paraphrases = _texts(_get(fields, "paraphrase_prompts"), "paraphrase_prompts")
    # ROME's neighbours share relation and object with the edit: their answer is the old one.
    return arguments, paraphrases, (neighbours, (truth,) * len(neighbours))


def _read_zsre(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...], Neighbours]:
    arguments = {
        "prompt": _get(fields, "src"),
        "subject": _get(fields, "subject"),
        "target_new": _get(fields, "alt"),
        "ground_truth": _text(_get(fields, "answers"), "answers"),
    }
    locality = _text(_get(fields, "loc"), "loc").removeprefix(_ZSRE_LOCALITY_PREFIX)
    answer = _text(_get(fields, "loc_ans"), "loc_ans")
    return arguments, _texts(_get(fields, "rephrase"), "rephrase"), ((locality,), (answer,))


def _read_known(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...], Neighbours]:
    """A known fact as the edit that would confirm it: new and old answer are the same."""
    attribute = _get(fields, "attribute")
    prompt = fields.get("prompt") or _get(fields, "template")
    arguments = {"prompt": prompt, "subject": _get(fields, "subject"), "target_new": attribute}
    return {**arguments, "ground_truth": attribute}, (), ((), ())


def _read_flat(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...], Neighbours]:
    arguments = {
        "prompt": _text(_get(fields, "prompt"), "prompt"),
        "subject": _text(_get(fields, "subject"), "subject"),
        "target_new": _text(_get(fields, "target_new"), "target_new"),
    }
    if fields.get("ground_truth") is not None:
        arguments["ground_truth"] = _text(fields["ground_truth"], "ground_truth")
    rephrases: tuple[str, ...] = ()
    for name in ("rephrase_prompt", "rephrase_prompts", "rephrase"):
        if fields.get(name):
            rephrases += _texts(fields[name], name)
    return arguments, rephrases, _flat_neighbours(fields)


def _flat_neighbours(fields: Fields) -> Neighbours:
    """Neighbours of EasyEdit's flat pair, of our lists, and of the nested `locality`."""
    prompts: list[str] = []
    answers: list[str | None] = []

    def add(prompt: Any, answer: Any, name: str) -> None:
        texts = _texts(prompt, name)
        prompts.extend(texts)
        if isinstance(prompt, list):
            if not isinstance(answer, list) or len(answer) != len(texts):
                raise ValueError(f"the {len(texts)} prompts of {name} need as many answers, got {answer!r}")
            answers.extend(None if one is None else _text(one, name) for one in answer)
        else:
            answers.append(_text(answer, name))

    if fields.get("locality_prompt"):
        add(fields["locality_prompt"], _get(fields, "locality_ground_truth"), "locality_prompt")
    if fields.get("locality_prompts"):
        own = fields["locality_prompts"]
        add(own, fields.get("locality_answers") or [None] * len(own), "locality_prompts")
    nested = fields.get("locality") or {}
    if not isinstance(nested, dict):
        raise TypeError(f"locality must be an object of groups, got {type(nested).__name__}")
    for group, entries in nested.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            name = f"locality.{group}"
            if not isinstance(entry, dict):
                raise TypeError(f"{name} must hold objects with 'prompt' and 'ground_truth', got {entry!r}")
            add(_get(entry, "prompt", f"{name}."), _get(entry, "ground_truth", f"{name}."), name)
    return tuple(prompts), tuple(answers)


def _get(fields: Fields, name: str, path: str = "") -> Any:
    if name not in fields:
        raise _MissingField(f"{path}{name}")
    return fields[name]


def _text(value: Any, name: str) -> str:
    """A text, the first of a (nested) list of aliases, or `value["str"]`."""
    while isinstance(value, (list, dict)) and value:
        if isinstance(value, dict):
            value = _get(value, "str", f"{name}.")
        else:
            value = value[0]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")
    return value


def _texts(value: Any, name: str) -> tuple[str, ...]:
    """One text or a list of them."""
    return tuple(_text(one, name) for one in value) if isinstance(value, list) else (_text(value, name),)
