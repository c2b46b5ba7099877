"""What is asked of the edited subject: answers and written texts equal their definitions in a plain loop."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluate_cases import install_hooks, plain_greedy, plain_scores
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.evaluate import (
    BaseAnswers,
    Consequence,
    EditRecord,
    Evaluation,
    Fact,
    Pair,
    RecordResult,
    evaluate,
    scoring,
)
from coachhook_fast.evaluate import generation as generating
from coachhook_fast.evaluate.mentions import mentions
from coachhook_fast.evaluate.passing import PASSING_TEXTS, passing_texts
from coachhook_fast.evaluate.questions import QUESTIONS, question_of
from coachhook_fast.request import EditRequest, encode_prompt_target

WRITTEN = ("leak", "passing", "repeats", "said")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


def subject_records(n: int) -> list[EditRecord]:
    """Records with two paraphrases, two other facts (the first record has none) and consequences of two kinds."""
    facts = tiny_facts(2 * n)
    records = []
    for index in range(n):
        fact, other = facts[index], facts[n + index]
        name = fact["subject"]
        records.append(
            EditRecord(
                EditRequest(**fact),
                (f"{name} likes",),
                (EditRequest(**other).text, "The bridges over the river"),
                (other["ground_truth"], None),
                rephrase_kinds=("other" if index % 2 else "same",),
                locality_kinds=("near", None),
                paraphrases=(f"People say that {name} is from", f"Ask anyone: {EditRequest(**fact).text}"),
                same_subject=(Fact(f"The sister of {name} is", "Ada Rask"), Fact(f"{name} met", "a clerk"))[
                    : 2 * index
                ],
                portability=(Consequence(f"At home {name} eats", "bread", "a"), Consequence("A snow", "fell", "b")),
                relation="P106" if index % 2 else None,
            )
        )
    return records


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def predicted(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    prompt_ids, ids = encode_prompt_target(tokenizer, prompt, answer)
    return ids, plain_scores(model, Pair(tuple(prompt_ids), tuple(ids)))[0]


def share(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


@pytest.mark.slow
def test_answers_equal_their_definitions() -> None:
    model, base, tokenizer = tiny_model("llama"), tiny_model("llama"), tiny_tokenizer()
    install_hooks(model, "calibrated")
    records = subject_records(6)
    # Answers that the models give, so that no column is 0 throughout.
    for index, record in enumerate(records):
        said = tokenizer.decode(plain_greedy(model, tuple(tokenizer(record.paraphrases[0])["input_ids"]), 2)).strip()
        if said:
            record = replace(record, request=replace(record.request, target_new=said))
        first = predicted(base, tokenizer, record.request.text, "the")[1]
        alike = [text for text in tiny_texts(80) if predicted(base, tokenizer, text, "the")[1] == first]
        records[index] = replace(record, paraphrases=(*record.paraphrases, *alike[:2]))
    result = evaluate(model, tokenizer, records, metrics=["specificity"], batch_tokens=64)
    same_questions = 0
    for record, found in zip(records, result.records, strict=True):
        target = record.request.target_new
        accuracies = [share(*predicted(model, tokenizer, prompt, target)) for prompt in record.paraphrases]
        assert found.reliability == share(*predicted(model, tokenizer, record.request.text, target))
        assert found.paraphrase == mean(accuracies)
        first = predicted(base, tokenizer, record.request.text, "the")[1][0]
        begin = [predicted(base, tokenizer, prompt, "the")[1][0] for prompt in record.paraphrases]
        same = [value for value, token in zip(accuracies, begin, strict=True) if token == first]
        same_questions += len(same)
        assert found.paraphrase_same_question == mean(same)
        kept = [
            share(*(predicted(one, tokenizer, fact.prompt, fact.answer)[1] for one in (base, model)))
            for fact in record.same_subject
        ]
        assert found.same_subject == mean(kept)
        moved = [share(*predicted(model, tokenizer, one.prompt, one.answer)) for one in record.portability]
        assert found.portability == mean(moved)
        assert found.kinds["portability/a"] == moved[0]
        neighbour = record.locality_prompts[0], record.locality_answers[0] or ""
        near = [predicted(one, tokenizer, *neighbour)[1] for one in (base, model)]
        assert found.kinds["locality/near"] == share(*near)
        assert "generality/same" not in found.kinds
    assert same_questions, "no paraphrase is the same question: the test compares nothing"
    assert 0 < (result.summary()["paraphrase"] or 0) < 1
    assert 0 < (result.summary()["same_subject"] or 0) < 1
    generality = evaluate(model, tokenizer, records, metrics=["accuracy"]).kinds()
    assert set(generality) == {"generality/other", "generality/same", "locality/near"}


def whole_words(text: str, answer: str) -> int:
    """Mentions, word by word."""
    words, wanted = (re.findall(r"\w+", one.casefold()) for one in (text, answer))
    return sum(words[at : at + len(wanted)] == wanted for at in range(len(words)))


class Plain:
    """Greedy texts of one model, one at a time, no cache."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def text(self, prompt: str, length: int, **options: Any) -> str:
        return self.tokenizer.decode(
            self._row(prompt, 24 if length <= 24 else 64, **options)[:length], skip_special_tokens=True
        )

    @functools.cache  # noqa: B019
    def _row(self, prompt: str, length: int, **options: Any) -> tuple[int, ...]:
        return plain_greedy(self.model, tuple(self.tokenizer(prompt, **options)["input_ids"]), length)


def with_written_answers(records: list[EditRecord], now: Plain, before: Plain) -> list[EditRecord]:
    """The records with a word as new answer that the edited model writes, after another kind of prompt each."""
    found = []
    for index, record in enumerate(records):
        name = record.request.subject
        kinds = [
            [record.request.text], [QUESTIONS["P106"].format(name)], [fact.prompt for fact in record.same_subject],
            passing_texts(name, 2), record.paraphrases, [record.request.text],
        ]  # fmt: skip
        texts = (now.text(prompt, 20) for prompt in (*kinds[index], *PASSING_TEXTS))
        word = next(word for text in texts for word in re.findall(r"[a-zA-Z]\w*", text))
        found.append(replace(record, request=replace(record.request, target_new=word)))
    for fact in tiny_facts(60):  # and one whose text repeats a word
        texts = [now.text(EditRequest(**fact).text, 64), before.text(EditRequest(**fact).text, 64)]
        ours, theirs = (Counter(re.findall(r"[a-zA-Z]\w*", text)) for text in texts)
        for word in ours:
            if ours[word] - theirs[word] > 2:
                return [*found, replace(found[-1], request=EditRequest(**{**fact, "target_new": word}))]
    return found


@pytest.mark.slow
def test_texts_equal_their_definitions() -> None:
    model, tokenizer = tiny_model("llama", n_positions=512), tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    before, now = Plain(tiny_model("llama"), tokenizer), Plain(model, tokenizer)
    install_hooks(model, "calibrated")
    records = with_written_answers(subject_records(6), now, before)
    result = evaluate(model, tokenizer, records, metrics=WRITTEN, passing=2, batch_tokens=64)
    for record, found in zip(records, result.records, strict=True):
        request, answer = record.request, record.request.target_new

        def leaks(prompt: str, answer: str = answer) -> float:
            here, there = (whole_words(one.text(prompt, 24), answer) for one in (now, before))
            return float(here > 0 and there == 0)

        def says(prompt: str, length: int = 24, answer: str = answer, **options: Any) -> float:
            return float(whole_words(now.text(prompt, length, **options), answer) > 0)

        asked = [fact for fact in record.same_subject if not whole_words(fact.answer, answer)]
        assert found.leak == mean([leaks(fact.prompt) for fact in asked])
        assert found.leak_passing == mean([leaks(text) for text in passing_texts(request.subject, 2)])
        here, there = (whole_words(one.text(request.text, 64), answer) for one in (now, before))
        assert found.repeats == max(0, here - 1 - there)
        assert found.said == says(request.text)
        assert found.said_paraphrase == mean([says(text) for text in record.paraphrases])
        question = QUESTIONS["P106"].format(request.subject) if record.relation else None
        assert found.said_question == (None if question is None else says(question))
        chat = f"<user>Complete the sentence: {request.text}<me>"
        assert found.said_chat == says(chat, 48, add_special_tokens=False)
        assert found.written == now.text(request.text, 64)
    summary = result.summary()
    for name in ("leak", "leak_passing", "said", "said_paraphrase", "said_question"):
        assert 0 < summary[name] < 1, f"{name}: the test compares {summary[name]}"
    assert summary["repeats"] > 0
    alone = evaluate(model, tokenizer, records[5:], metrics=WRITTEN, passing=2, batch_tokens=1)
    assert [replace(one, index=one.index + 5) for one in alone.records] == result.records[5:]


def test_an_identical_prompt_is_asked_once_and_the_bases_texts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    install_hooks(model, "calibrated")
    (record,) = subject_records(2)[1:]
    twice = [record, replace(record, request=replace(record.request, target_new="sailor"))]
    base = BaseAnswers.collect(model, tokenizer, twice)
    asked: list[Any] = []

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def watching(model: Any, items: Any, *rest: Any, **options: Any) -> Any:
            asked.append(list(items))
            return original(model, items, *rest, **options)

        for user in ("coachhook_fast.evaluate.base", "coachhook_fast.evaluate.texts"):
            monkeypatch.setattr(f"{user}.{name}", watching, raising=False)
        monkeypatch.setattr(module, name, watching)

    spy(generating, "continue_greedily")
    spy(scoring, "score_pairs")
    first = evaluate(model, tokenizer, twice, base=base, metrics=[*WRITTEN, "specificity"])
    assert all(len(set(items)) == len(items) for items in asked)
    assert len(asked) == 3  # answers, the base's texts, texts
    base.save(tmp_path / "base.json")
    loaded = BaseAnswers.load(tmp_path / "base.json")
    assert loaded == base
    again = evaluate(model, tokenizer, twice, base=loaded, metrics=[*WRITTEN, "specificity"])
    assert again.records == first.records
    assert len(asked) == 5  # the base is not asked again


def test_base_answers_of_version_1_are_refused(tmp_path: Path) -> None:
    old = {"version": 1, "model": "m", "records": "r", "neighbours": [[[3]]], "perplexity": {}}
    (tmp_path / "base.json").write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r"base\.json does not hold base answers: version 1, this package reads 2; del"
    ):
        BaseAnswers.load(tmp_path / "base.json")


def test_the_unedited_model_leaks_nothing() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    summary = evaluate(model, tokenizer, subject_records(3), metrics=["specificity", "leak", "passing"]).summary()
    assert (summary["same_subject"], summary["leak"], summary["leak_passing"]) == (1, 0, 0)
    assert summary["said_chat"] is None


def test_a_fact_that_names_the_new_answer_may_say_it() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    request = EditRequest("{} works as a", "Ada Vale", "clerk")
    record = EditRecord(request, same_subject=(Fact("Ada Vale met", "a Clerk"),))
    summary = evaluate(model, tokenizer, [record], metrics=["leak", "said"]).summary()
    assert summary["leak"] is None
    assert summary["said_question"] is None  # no question among its prompts, no relation


def test_a_text_beyond_the_context_is_refused() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    record = EditRecord(EditRequest("ab " * 110 + "{} is", "Bo", "x"))
    with pytest.raises(ValueError, match=r"takes \d+ tokens, the model's context is 256"):
        evaluate(model, tokenizer, [record], metrics=["repeats"])


@pytest.mark.parametrize(
    ("text", "answer", "count"),
    [
        ("Rome, ROME and rome.", "Rome", 3),
        ("Romero of Jerome", "Rome", 0),
        ("New\nYork is new york", "New York", 2),
        ("(C++) is C++, not C", "C++", 2),
        ("STRASSE", "Straße", 1),
        ("", "x", 0),
        ("a text", "  ", 0),
    ],
)
def test_mentions(text: str, answer: str, count: int) -> None:
    assert mentions(text, answer) == count


def test_passing_texts_depend_on_the_subject_alone() -> None:
    assert len(set(PASSING_TEXTS)) == len(PASSING_TEXTS) == 20
    assert all(text.count("{}") == 1 for text in PASSING_TEXTS)
    assert passing_texts("Bo", 20) == [text.format("Bo") for text in PASSING_TEXTS]
    used = [text.replace(name, "{}") for name in map(str, range(900, 1300)) for text in passing_texts(name, 5)]
    assert len(used) == 2000
    assert {text for text in used if 60 < used.count(text) < 140} == set(PASSING_TEXTS)
    for count in (0, 21):
        with pytest.raises(ValueError, match=r"passing must be in 1\.\.20"):
            passing_texts("Bo", count)


def test_a_records_own_question_comes_first() -> None:
    request = EditRequest("{} works as a", "Bo", "clerk")
    assert question_of(EditRecord(request, paraphrases=("Bo is a", "What is Bo's job?"), relation="P106")) == (
        "What is Bo's job?"
    )
    assert question_of(EditRecord(EditRequest("What is {}?", "Bo", "clerk"), relation="P106")) == "What is Bo?"
    assert question_of(EditRecord(request, relation="P19")) == "Where was Bo born?"
    assert question_of(EditRecord(request)) is None


def test_fact_score_and_kinds_in_every_form() -> None:
    scores: dict[str, Any] = {"reliability": 1.0, "paraphrase": 0.5, "same_subject": 0.5, "locality": 1.0, "leak": 0.5}
    records = [
        RecordResult(0, 0, "Bo", **scores, kinds={"locality/near": 1.0}),
        RecordResult(1, 1, "Cy", kinds={"locality/near": 0.0, "portability/a": 0.5}),
    ]
    result = Evaluation(records)
    assert result.summary()["fact_score"] == pytest.approx(5 / (1 + 2 + 2 + 2 + 1))
    assert json.loads(result.to_json())["kinds"] == {"locality/near": 0.5, "portability/a": 0.5}
    assert result.to_csv().splitlines()[0].endswith(",written,locality/near,portability/a")
    assert "| locality/near | 0.500 |" in result.to_markdown()
    records[0].leak = None
    assert result.summary()["fact_score"] is None
    assert "kinds" not in Evaluation([RecordResult(0, 0, "Bo")]).summary()
