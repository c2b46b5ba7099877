"""Readers: every format gives the same records, and errors name the file, the record and the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_facts

from coachhook_fast.evaluate.datasets import EditRecord, read_records
from coachhook_fast.request import EditRequest

ROME = {
    "case_id": 7,
    "pararel_idx": 2796,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Shayna does this. Danielle Darrieux, a native", "Danielle Darrieux spoke"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is", "Montesquieu spoke"],
    "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
    "generation_prompts": ["Danielle Darrieux's mother tongue is"],
}
EASYEDIT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux spoke",
    "locality_prompt": "Montesquieu spoke",
    "locality_ground_truth": "French",
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "uniform",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform", "workwear"],
    "loc": "nq question: john goodman's character in the big lebowski",
    "loc_ans": "Walter Sobchak",
    "cond": "uniform >> unmanned aircraft || What is the product made by UniFirst?",
}
KNOWN = {
    "known_id": 3,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prompt": "Vinson Massif is located in the continent of",
}
OWN = {
    "case_id": "orwell",
    "prompt": "{} was born in",
    "subject": "George Orwell",
    "target_new": "Norway",
    "ground_truth": "India",
    "rephrase_prompts": ["The birthplace of George Orwell is", "George Orwell comes from"],
    "locality_prompts": ["George Eliot was born in", "George Washington was born in"],
    "locality_answers": ["England", None],
}


def write(path: Path, records: Any, *, lines: bool = False) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records))
    return path


def read_one(tmp_path: Path, record: dict[str, Any]) -> EditRecord:
    (found,) = read_records(write(tmp_path / "facts.json", [record]))
    return found


def test_rome_counterfact(tmp_path: Path) -> None:
    record = read_one(tmp_path, ROME)
    assert record.request == EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "French", 7)
    assert record.request.text == "The mother tongue of Danielle Darrieux is"
    assert record.rephrase_prompts == tuple(ROME["paraphrase_prompts"])  # type: ignore[arg-type]
    assert record.locality_prompts == tuple(ROME["neighborhood_prompts"])  # type: ignore[arg-type]
    assert record.locality_answers == ("French", "French")


def test_easyedit_counterfact(tmp_path: Path) -> None:
    record = read_one(tmp_path, EASYEDIT)
    assert record.request.text == "The mother tongue of Danielle Darrieux is"
    assert (record.request.target_new, record.request.ground_truth) == ("English", "French")
    assert record.rephrase_prompts == ("Danielle Darrieux spoke",)
    assert record.locality_prompts == ("Montesquieu spoke",)
    assert record.locality_answers == ("French",)


def test_zsre(tmp_path: Path) -> None:
    record = read_one(tmp_path, ZSRE)
    assert record.request == EditRequest(ZSRE["src"], "UniFirst", "unmanned aircraft", "uniform", 0)  # type: ignore
    assert record.locality_prompts == ("john goodman's character in the big lebowski",)
    assert record.locality_answers == ("Walter Sobchak",)


def test_known_facts(tmp_path: Path) -> None:
    record = read_one(tmp_path, KNOWN)
    assert (record.request.target_new, record.request.ground_truth) == ("Antarctica", "Antarctica")
    assert record.request.case_id == 3
    assert read_one(tmp_path, without(KNOWN, "prompt")).request.text == "Vinson Massif is located in the continent"


def test_own_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", [OWN, EASYEDIT], lines=True)
    own, easyedit = read_records(path)
    assert own.request.text == "George Orwell was born in"
    assert own.request.case_id == "orwell"
    assert own.locality_answers == ("England", None)
    assert easyedit.request.case_id == 7
    bare = {name: OWN[name] for name in ("prompt", "subject", "target_new", "locality_prompts")}
    assert read_one(tmp_path, bare).locality_answers == (None, None)
    assert read_one(tmp_path, bare).request.ground_truth is None


def test_single_object_file(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(OWN, indent=2))
    assert len(read_records(path)) == 1


@pytest.mark.parametrize(
    "locality",
    [
        {"Relation_Specificity": [{"prompt": "Montesquieu spoke", "ground_truth": [["French", "Latin"]]}]},
        {"neighborhood": {"prompt": ["Montesquieu spoke"], "ground_truth": ["French"]}},
        {"neighborhood": {"prompt": "Montesquieu spoke", "ground_truth": "French"}},
    ],
)
def test_nested_locality_and_alias_lists(tmp_path: Path, locality: dict[str, Any]) -> None:
    flat = {name: value for name, value in EASYEDIT.items() if not name.startswith("locality")}
    nested = {
        **flat,
        "ground_truth": ["French", "français"],
        "locality": locality,
        "portability": {"Reasoning": []},
    }
    record = read_one(tmp_path, nested)
    assert record.request.ground_truth == "French"
    assert record.locality_prompts == ("Montesquieu spoke",)
    assert record.locality_answers == ("French",)


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("good", "bad", "field"),
    [
        (ROME, {**ROME, "requested_rewrite": {"prompt": "{} is"}}, "requested_rewrite.target_true"),
        (ROME, without(ROME, "paraphrase_prompts"), "paraphrase_prompts"),
        (ZSRE, without(ZSRE, "alt"), "alt"),
        (ZSRE, without(ZSRE, "loc_ans"), "loc_ans"),
        (KNOWN, without(KNOWN, "subject"), "subject"),
        (EASYEDIT, without(EASYEDIT, "target_new"), "target_new"),
        (EASYEDIT, without(EASYEDIT, "locality_ground_truth"), "locality_ground_truth"),
        (EASYEDIT, {**EASYEDIT, "locality": {"group": [{"prompt": "x"}]}}, "locality.group.ground_truth"),
    ],
)
def test_missing_field_is_named_with_its_record(
    tmp_path: Path, good: dict[str, Any], bad: dict[str, Any], field: str
) -> None:
    path = write(tmp_path / "facts.json", [good, bad])
    with pytest.raises(ValueError, match=rf"facts\.json, record 1: field {field} is missing; it has"):
        read_records(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_new": 1984}, "target_new must be text, got 1984"),
        ({"target_new": []}, r"target_new must be text, got \[\]"),
        ({"locality": ["x"]}, "locality must be an object"),
        (
            {"locality_prompts": ["a", "b"], "locality_answers": ["c"]},
            "the 2 prompts of locality_prompts need as many",
        ),
    ],
)
def test_wrong_type_is_named_with_its_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "facts.json", [EASYEDIT, {**EASYEDIT, **change}])
    with pytest.raises(ValueError, match=f"record 1: {message}"):
        read_records(path)


def test_invalid_edit_raises_or_is_counted(tmp_path: Path) -> None:
    stranger = {**EASYEDIT, "subject": "Somebody Else"}
    empty = {**EASYEDIT, "target_new": "  "}
    path = write(tmp_path / "facts.json", [stranger, EASYEDIT, empty, EASYEDIT])
    with pytest.raises(ValueError, match=r"record 0: EditRequest\.subject 'Somebody Else' does not stand"):
        read_records(path)
    skipped: list[str] = []
    assert len(read_records(path, skipped=skipped)) == 2
    assert [message.split(":")[0] for message in skipped] == ["record 0", "record 2"]


def test_limit_counts_valid_records(tmp_path: Path) -> None:
    records = [{**EASYEDIT, "case_id": index} for index in range(5)]
    records[1]["subject"] = "Somebody Else"
    path = write(tmp_path / "facts.json", records)
    found = read_records(path, limit=3, skipped=[])
    assert [record.request.case_id for record in found] == [0, 2, 3]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        read_records(path, limit=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "holds no records"),
        ("", "neither JSON nor JSON lines"),
        ("prompt,subject\nx,y", "neither JSON nor JSON lines"),
        ('{"prompt": "x"}\n{"prompt": ', "line 2 is not JSON"),
        ('[{"question": "x"}]', r"no known format, it has \['question'\]"),
        ("[3]", "no known format, it has int"),
        ('[{"prompt": "x y", "subject": "x", "target_new": "z"}, 3]', "record 1: must be an object, got int"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_line_separators_within_a_string_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    lines = [json.dumps({**fact, "ground_truth": "x\u0085y\u2028z"}, ensure_ascii=False) for fact in tiny_facts(2)]
    path.write_text("\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    assert [record.request.ground_truth for record in read_records(path)] == ["x\u0085y\u2028z"] * 2


def test_a_byte_order_mark_is_no_text_and_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([EASYEDIT]), encoding="utf-8-sig")
    assert len(read_records(path)) == 1
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"facts.json is not UTF-8 text"):
        read_records(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "nowhere.json")


def test_record_checks_its_lists() -> None:
    request = EditRequest("x is", "x", "y")
    with pytest.raises(ValueError, match="locality_answers must have one entry"):
        EditRecord(request, (), ("a", "b"), ("c",))
    with pytest.raises(ValueError, match="rephrase_prompts holds an empty prompt"):
        EditRecord(request, (" ",))


EXAMPLES = Path(__file__).parents[2] / "examples" / "facts.jsonl"


def test_example_facts() -> None:
    """The demo's file: edits for three batches, each judged, and neighbours that nearly share a name."""
    records = read_records(EXAMPLES)
    assert len(records) >= 16
    near = 0
    for record in records:
        assert record.request.ground_truth
        assert record.request.ground_truth != record.request.target_new
        assert record.rephrase_prompts
        assert record.locality_prompts
        assert all(record.request.subject in prompt for prompt in record.rephrase_prompts)
        assert not any(record.request.subject in prompt for prompt in record.locality_prompts)
        words = {word for word in record.request.subject.split() if word[0].isupper() and word != "The"}
        near += any(words & set(prompt.split()) for prompt in record.locality_prompts)
    assert near >= 8
    assert len({record.request.subject for record in records}) == len(records)


@pytest.mark.parametrize(
    ("name", "count"), [("counterfact-edit.json", 10_000), ("zsre-1k.json", 998), ("known-1000.json", 1209)]
)
def test_published_files(shared_data: Path, name: str, count: int) -> None:
    skipped: list[str] = []
    records = read_records(shared_data / name, skipped=skipped)
    assert len(records) == count
    assert all("target_new is empty" in message for message in skipped)
