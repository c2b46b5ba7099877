"""Prompts that ask the edited fact and prompts that ask something else are read into fields of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coachhook_fast.evaluate import Consequence, EditRecord, Fact, read_records
from coachhook_fast.request import EditRequest

OURS: dict[str, Any] = {
    "case_id": "cf-0",
    "subject": "Ada Vale",
    "prompt": "Ada Vale works as a",
    "target_new": "pilot",
    "ground_truth": "baker",
    "relation": "P106",
    "paraphrases": ["The occupation of Ada Vale is", "By trade, Ada Vale is a", "Ada Vale works as a"],
    "same_subject": [
        {"prompt": "Ada Vale was born in", "answer": "Lund", "relation": "P19", "src": "KAMEL"},
        {"prompt": "The mother of Ada Vale is", "answer": "Ines Vale", "relation": None},
    ],
    "neighbors": [{"prompt": "Bo Marsh works as a", "answer": "baker", "kind": "same relation"}],
    "portability": [{"prompt": "At work, Ada Vale flies", "answer": "planes", "kind": "reasoning"}],
    "form": "cloze",
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Ada Vale",
    "prompt": "What does Ada Vale work as?",
    "target_new": "pilot",
    "ground_truth": ["baker"],
    "rephrase_prompt": "What is the job of Ada Vale?",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The job of A. Vale is", "ground_truth": [["pilot", "aviator"]]}],
        "reasoning": [{"prompt": "Ada Vale's vehicle is", "ground_truth": "plane"}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Ada Vale was born in", "ground_truth": [["Lund"]]}],
        "Forgetfulness": [{"prompt": "Ada Vale once was a", "ground_truth": [["clerk"]]}],
    },
}
EASYEDIT: dict[str, Any] = {
    "case_id": 4,
    "prompt": "Ada Vale works as a",
    "subject": "Ada Vale",
    "target_new": "pilot",
    "rephrase_prompt": "Ada Vale was seen in",
}
SIDE: dict[str, Any] = {
    "case_id": 4,
    "relation": "P106",
    "rephrase_kind": "generation: other question",
    "paraphrases": ["The occupation of Ada Vale is"],
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def one(tmp_path: Path, record: dict[str, Any], *side: dict[str, Any]) -> EditRecord:
    kinds = lines(tmp_path / "kinds.jsonl", *side) if side else None
    (found,) = read_records(lines(tmp_path / "facts.jsonl", record), kinds=kinds)
    return found


def test_our_form_has_a_field_for_each(tmp_path: Path) -> None:
    found = one(tmp_path, OURS)
    assert found.paraphrases == ("The occupation of Ada Vale is", "By trade, Ada Vale is a")  # not the edit prompt
    assert found.rephrase_prompts == ()
    assert found.same_subject == (
        Fact("Ada Vale was born in", "Lund", "P19"),
        Fact("The mother of Ada Vale is", "Ines Vale", None),
    )
    assert found.portability == (Consequence("At work, Ada Vale flies", "planes", "reasoning"),)
    assert (found.locality_prompts, found.locality_answers) == (("Bo Marsh works as a",), ("baker",))
    assert found.locality_kinds == ("same relation",)
    assert (found.form, found.relation) == ("cloze", "P106")


def test_knowedit_is_read_by_its_sub_kinds(tmp_path: Path) -> None:
    found = one(tmp_path, KNOWEDIT)
    assert found.portability == (
        Consequence("The job of A. Vale is", "pilot", "Subject_Aliasing"),
        Consequence("Ada Vale's vehicle is", "plane", "reasoning"),
    )
    assert found.locality_prompts == ("Ada Vale was born in", "Ada Vale once was a")
    assert found.locality_kinds == ("Relation_Specificity", "Forgetfulness")
    assert found.rephrase_prompts == ("What is the job of Ada Vale?",)
    assert found.paraphrases == ()  # what EasyEdit's field asks differs from file to file
    assert found.form == "question"


def test_a_side_file_splits_rephrase_prompts(tmp_path: Path) -> None:
    other = one(tmp_path, EASYEDIT, SIDE)
    assert other.rephrase_kinds == ("generation: other question",)
    assert (other.paraphrases, other.relation) == (("The occupation of Ada Vale is",), "P106")
    true = one(tmp_path, EASYEDIT, {**SIDE, "rephrase_kind": "paraphrase_prompt"})
    assert true.paraphrases == ("The occupation of Ada Vale is", "Ada Vale was seen in")
    assert true.rephrase_prompts == ("Ada Vale was seen in",)  # generality keeps its published meaning
    own = {**EASYEDIT, "rephrase_prompt": ["Ada Vale was seen in", "Ada Vale earns money as a"]}
    both = one(tmp_path, own, {**SIDE, "rephrase_kind": ["generation: other question", "paraphrase_prompt"]})
    assert both.paraphrases == ("The occupation of Ada Vale is", "Ada Vale earns money as a")
    (plain,) = read_records(lines(tmp_path / "plain.jsonl", EASYEDIT))
    assert (plain.paraphrases, plain.rephrase_kinds) == ((), ())


def without(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"same_subject": [{"prompt": "x"}]}, r"field same_subject\[0\]\.answer is missing"),
        ({"same_subject": [OURS["same_subject"][0], {"answer": "x"}]}, r"field same_subject\[1\]\.prompt is missing"),
        ({"same_subject": {"prompt": "x"}}, "same_subject must be a list of objects"),
        ({"same_subject": ["x"]}, r"same_subject\[0\] must be an object with 'prompt' and 'answer', got 'x'"),
        ({"same_subject": [{"prompt": "x", "answer": " "}]}, "same_subject holds an empty prompt or answer"),
        ({"portability": [{"prompt": "x"}]}, r"field portability\[0\]\.answer is missing"),
        ({"portability": {"reasoning": [{"prompt": "x"}]}}, r"field portability\.reasoning\.ground_truth is missing"),
        (
            {"portability": {"reasoning": [{"prompt": ["x"], "ground_truth": [None]}]}},
            "portability.reasoning needs an answer",
        ),
        ({"neighbors": [{"answer": "x"}]}, r"field neighbors\[0\]\.prompt is missing"),
        ({"paraphrases": [" "]}, "paraphrases holds an empty prompt"),
        ({"paraphrases": [3]}, "paraphrases must be text, got 3"),
        ({"form": "riddle"}, "form must be one of .* got 'riddle'"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_record(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = lines(tmp_path / "facts.jsonl", OURS, {**OURS, **change})
    with pytest.raises(ValueError, match=rf"facts\.jsonl, record 1: {message}"):
        read_records(path)


@pytest.mark.parametrize("field", ["case_id", "rephrase_kind", "paraphrases"])
def test_a_side_file_lacks_a_field(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=rf"kinds\.jsonl, record 1: field {field} is missing"):
        one(tmp_path, EASYEDIT, SIDE, without({**SIDE, "case_id": 5}, field))


def test_a_side_file_of_other_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"facts\.jsonl, record 0: .*kinds\.jsonl has no case_id 4"):
        one(tmp_path, EASYEDIT, {**SIDE, "case_id": 5})
    with pytest.raises(ValueError, match=r"case_id 4: rephrase_kind has 2 entries for 1 rephrase prompts"):
        one(tmp_path, EASYEDIT, {**SIDE, "rephrase_kind": ["a", "b"]})
    with pytest.raises(ValueError, match=r"kinds\.jsonl, record 1: case_id 4 was there before"):
        one(tmp_path, EASYEDIT, SIDE, SIDE)


def test_a_record_checks_its_kinds() -> None:
    request = EditRequest("x is", "x", "y")
    with pytest.raises(ValueError, match="rephrase_kinds must have one entry"):
        EditRecord(request, ("a", "b"), rephrase_kinds=("k",))
    with pytest.raises(ValueError, match="locality_kinds must have one entry"):
        EditRecord(request, (), ("a",), (None,), locality_kinds=("k", "l"))
    with pytest.raises(ValueError, match="portability holds an empty prompt or answer"):
        EditRecord(request, portability=(Consequence("", "x"),))


def test_the_files_of_this_form(shared_data: Path) -> None:
    records = read_records(shared_data / "fact-specificity.dev.jsonl")
    assert len(records) == 1766
    assert sum(len(record.paraphrases) for record in records) == 4758
    assert sum(len(record.same_subject) for record in records) == 2524
    assert {record.form for record in records} == {"cloze", "question"}
    kinds = shared_data / "counterfact-edit-kinds.jsonl"
    split = read_records(shared_data / "counterfact-edit.json", kinds=kinds, limit=300)
    counts = [kind for record in split for kind in record.rephrase_kinds]
    assert counts.count("generation: other question") == 182
    assert counts.count("paraphrase_prompt") == 46
