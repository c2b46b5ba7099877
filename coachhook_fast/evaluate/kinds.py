"""A side file that says of each record what its rephrase prompts ask.

EasyEdit's CounterFact mixes paraphrases of the edit prompt with prompts that ask something else about the subject, in
one field. The side file has a JSON object a line: `case_id`, `rephrase_kind` (one text, or a list with one for each
rephrase prompt), `paraphrases` (true ones, a list), and optionally `relation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from coachhook_fast.evaluate import fields as read
from coachhook_fast.evaluate.record import EditRecord, distinct_paraphrases

PARAPHRASE = "paraphrase_prompt"  # CounterFact's field of that name: the rephrase prompt asks for the edited fact


@dataclass(frozen=True)
class Kinds:
    """What the side file says of one record."""

    rephrase_kinds: tuple[str, ...]
    paraphrases: tuple[str, ...]
    relation: str | None


def read_kinds(path: str | Path) -> dict[str, Kinds]:
    """By the records' case ids, as text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, or a line lacks a field or repeats a case; the message names file, record and
            field.
    """
    path = Path(path)
    found: dict[str, Kinds] = {}
    for index, fields in enumerate(read.load(path)):
        with read.naming(path, index, fields):
            case = str(read.get(fields, "case_id"))
            if case in found:
                raise ValueError(f"case_id {case} was there before")
            found[case] = Kinds(
                read.texts(read.get(fields, "rephrase_kind"), "rephrase_kind"),
                read.texts(read.get(fields, "paraphrases"), "paraphrases"),
                read.optional_text(fields, "relation"),
            )
    return found


def with_kinds(record: EditRecord, kinds: dict[str, Kinds], path: str | Path) -> EditRecord:
    """The record with its rephrase prompts' kinds, and with its true paraphrases apart from them.

    Raises:
        ValueError: the file says nothing of this case, or of more or fewer rephrase prompts.
    """
    case = str(record.request.case_id)
    if case not in kinds:
        raise ValueError(f"{path} has no case_id {case}")
    said, count = kinds[case], len(record.rephrase_prompts)
    names = said.rephrase_kinds * count if len(said.rephrase_kinds) == 1 else said.rephrase_kinds
    if len(names) != count:
        raise ValueError(f"{path}, case_id {case}: rephrase_kind has {len(names)} entries for {count} rephrase prompts")
    own = tuple(text for text, name in zip(record.rephrase_prompts, names, strict=True) if name == PARAPHRASE)
    return replace(
        record,
        rephrase_kinds=names,
        paraphrases=distinct_paraphrases(record.request.text, record.paraphrases, said.paraphrases, own),
        relation=record.relation or said.relation,
    )
