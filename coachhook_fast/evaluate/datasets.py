"""Facts to edit and to judge an edit by, read from the formats the field uses.

`read_records` recognises a file by the fields of its first record:

- ROME and MEMIT CounterFact (`requested_rewrite`): `target_new.str` replaces `target_true.str`;
  `paraphrase_prompts`, `neighborhood_prompts`.
- ZsRE in MEND's form (`src`, `alt`): `alt` replaces `answers[0]`; `rephrase`; `loc` without its "nq question:
  " and `loc_ans`.
- Known facts (`attribute`): the attribute is the new and the old answer.
- EasyEdit CounterFact, KnowEdit and our own JSONL (`prompt`): `target_new` replaces `ground_truth`;
  `rephrase_prompt` or a list `rephrase_prompts`; `locality_prompt` with `locality_ground_truth`, lists
  `locality_prompts` with `locality_answers` (optional, entries may be null), or EasyEdit's nested `locality`;
  `portability`, nested or a list; `paraphrases`, `same_subject`, `neighbors`, `form`, `relation`. What the
  edit itself is given: `given_paraphrases`, `keep` (`EditRequest`).

A file is a JSON list of records, one JSON record, or JSON lines. A neighbour is a prompt whose answer must
not change. docs/evaluation.md has the table of fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coachhook_fast.evaluate.fields import (
    Asked,
    Fields,
    asked,
    asked_in_groups,
    asked_in_list,
    get,
    load,
    naming,
    optional_text,
    text,
    texts,
)
from coachhook_fast.evaluate.kinds import read_kinds, with_kinds
from coachhook_fast.evaluate.record import Consequence, EditRecord, Fact, distinct_paraphrases
from coachhook_fast.request import EditRequest

__all__ = ["Consequence", "EditRecord", "Fact", "read_records"]

_ZSRE_LOCALITY_PREFIX = "nq question: "


def read_records(
    path: str | Path,
    *,
    kinds: str | Path | None = None,
    limit: int | None = None,
    skipped: list[str] | None = None,
) -> list[EditRecord]:
    """Reads the records of `path`, in the file's order.

    Args:
        path: the file; see the module's table for the formats.
        kinds: a file that says what the records' rephrase prompts ask (`evaluate.kinds`), for files that do not
            tell paraphrases from other prompts.
        limit: stop after this many records.
        skipped: None raises at a record that is no valid edit (its subject does not stand in its prompt, its
            target is empty). A list collects the message of each such record instead, and the record is left
            out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, empty or of no known format; a record lacks a field or, with
            `skipped` None, is no valid edit; `kinds` says nothing of a record. The message names the file, the
            record's index and the field.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(path)
    raw = load(path)
    read = _recognise(raw[0], path)
    side = None if kinds is None else read_kinds(kinds)
    records: list[EditRecord] = []
    for index, fields in enumerate(raw):
        if len(records) == limit:
            break
        with naming(path, index, fields):
            request, prompts = read(fields)
        request.setdefault("case_id", fields.get("case_id", fields.get("known_id", index)))
        try:
            record = EditRecord(EditRequest(**request), **prompts)
        except (TypeError, ValueError) as error:
            if skipped is None:
                raise ValueError(f"{path}, record {index}: {error}") from None
            skipped.append(f"record {index}: {error}")
            continue
        if side is not None and kinds is not None:
            with naming(path, index, fields):
                record = with_kinds(record, side, kinds)
        records.append(_complete(record))
    return records


def _complete(record: EditRecord) -> EditRecord:
    """The record with each paraphrase once and, where the file does not say it, the form of its prompt."""
    prompt = record.request.text
    form = record.form or ("question" if prompt.rstrip().endswith("?") else "cloze")
    return replace(record, form=form, paraphrases=distinct_paraphrases(prompt, record.paraphrases))


Reader = Callable[[Fields], tuple[dict[str, Any], dict[str, Any]]]  # arguments of EditRequest and of EditRecord


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


def _read_rome(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    rewrite = get(fields, "requested_rewrite")
    if not isinstance(rewrite, dict):
        raise TypeError(f"requested_rewrite must be an object, got {rewrite!r}")
    truth = text(get(rewrite, "target_true", "requested_rewrite."), "requested_rewrite.target_true")
    request = {
        "prompt": get(rewrite, "prompt", "requested_rewrite."),
        "subject": get(rewrite, "subject", "requested_rewrite."),
        "target_new": text(get(rewrite, "target_new", "requested_rewrite."), "requested_rewrite.target_new"),
        "ground_truth": truth,
    }
    neighbours = texts(get(fields, "neighborhood_prompts"), "neighborhood_prompts")
    paraphrases = texts(get(fields, "paraphrase_prompts"), "paraphrase_prompts")
    return request, {
        "rephrase_prompts": paraphrases,
        "paraphrases": paraphrases,
        # ROME's neighbours share relation and object with the edit: their answer is the old one.
        "locality_prompts": neighbours,
        "locality_answers": (truth,) * len(neighbours),
        "relation": optional_text(rewrite, "relation_id"),
    }


def _read_zsre(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    request = {
        "prompt": get(fields, "src"),
        "subject": get(fields, "subject"),
        "target_new": get(fields, "alt"),
        "ground_truth": text(get(fields, "answers"), "answers"),
    }
    locality = text(get(fields, "loc"), "loc").removeprefix(_ZSRE_LOCALITY_PREFIX)
    answer = text(get(fields, "loc_ans"), "loc_ans")
    paraphrases = texts(get(fields, "rephrase"), "rephrase")
    return request, {
        "rephrase_prompts": paraphrases,
        "paraphrases": paraphrases,
        "locality_prompts": (locality,),
        "locality_answers": (answer,),
    }


def _read_known(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """A known fact as the edit that would confirm it: new and old answer are the same."""
    attribute = get(fields, "attribute")
    prompt = fields.get("prompt") or get(fields, "template")
    request = {"prompt": prompt, "subject": get(fields, "subject"), "target_new": attribute}
    return {**request, "ground_truth": attribute}, {}


def _read_flat(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    request: dict[str, Any] = {
        "prompt": text(get(fields, "prompt"), "prompt"),
        "subject": text(get(fields, "subject"), "subject"),
        "target_new": text(get(fields, "target_new"), "target_new"),
    }
    if fields.get("ground_truth") is not None:
        request["ground_truth"] = text(fields["ground_truth"], "ground_truth")
    for name, field in (("paraphrases", "given_paraphrases"), ("keep", "keep")):
        if fields.get(field):
            request[name] = texts(fields[field], field)
    rephrases = {
        name: texts(fields[name], name)
        for name in ("rephrase_prompt", "rephrase_prompts", "rephrase")
        if fields.get(name)
    }
    # In our own list they are paraphrases by definition; what EasyEdit's field asks differs from file to file.
    paraphrases = rephrases.get("rephrase_prompts", ())
    if fields.get("paraphrases"):
        paraphrases += texts(fields["paraphrases"], "paraphrases")
    neighbours = _flat_neighbours(fields)
    return request, {
        "rephrase_prompts": tuple(prompt for group in rephrases.values() for prompt in group),
        "paraphrases": paraphrases,
        "locality_prompts": tuple(prompt for prompt, _, _ in neighbours),
        "locality_answers": tuple(answer for _, answer, _ in neighbours),
        "locality_kinds": tuple(kind for _, _, kind in neighbours),
        "same_subject": tuple(
            Fact(*fact) for fact in asked_in_list(fields.get("same_subject") or [], "same_subject", "relation")
        ),
        "portability": _flat_portability(fields),
        "form": optional_text(fields, "form"),
        "relation": optional_text(fields, "relation"),
    }


def _flat_neighbours(fields: Fields) -> list[Asked]:
    """Neighbours of EasyEdit's flat pair, of our lists, and of the nested `locality`."""
    found: list[Asked] = []
    if fields.get("locality_prompt"):
        found += asked(fields["locality_prompt"], get(fields, "locality_ground_truth"), "locality_prompt")
    if fields.get("locality_prompts"):
        own = fields["locality_prompts"]
        found += asked(own, fields.get("locality_answers") or [None] * len(own), "locality_prompts")
    found += asked_in_groups(fields.get("locality") or {}, "locality")
    return [*found, *asked_in_list(fields.get("neighbors") or [], "neighbors", "kind")]


def _flat_portability(fields: Fields) -> tuple[Consequence, ...]:
    """Our list, or KnowEdit's groups by kind."""
    value = fields.get("portability") or []
    if not isinstance(value, dict):
        return tuple(Consequence(*one) for one in asked_in_list(value, "portability", "kind"))
    found = []
    for prompt, answer, kind in asked_in_groups(value, "portability"):
        if answer is None:
            raise ValueError(f"portability.{kind} needs an answer to {prompt!r}")
        found.append(Consequence(prompt, answer, kind))
    return tuple(found)
