"""Every metric equals its definition written out; base answers; the forms of a result."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from evaluate_cases import install_hooks, plain_greedy, plain_scores
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.evaluate import (
    BaseAnswers,
    Evaluation,
    HeldOut,
    Pair,
    RecordResult,
    evaluate,
    perplexity,
)
from coachhook_fast.evaluate.datasets import EditRecord
from coachhook_fast.evaluate.drift import DRIFT_PROMPTS
from coachhook_fast.evaluate.harness import run_tasks
from coachhook_fast.evaluate.mentions import names_any
from coachhook_fast.evaluate.result import harmonic_mean
from coachhook_fast.request import EditRequest, encode_prompt_target


def tiny_records(n: int, *, answers: bool = True) -> list[EditRecord]:
    facts = tiny_facts(2 * n)
    return [
        EditRecord(
            EditRequest(**facts[index]),
            (f"People say that {facts[index]['subject']} is from", f"{facts[index]['subject']} likes"),
            (EditRequest(**facts[n + index]).text, "The bridges over the river"),
            (facts[n + index]["ground_truth"] if answers else None, None),
        )
        for index in range(n)
    ]


def by_hand(model: Any, tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int], float]:
    """Target ids, predictions, and mean log-probability of the target."""
    prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, target)
    predictions, logprobs = plain_scores(model, Pair(tuple(prompt_ids), tuple(target_ids)))
    return target_ids, predictions, sum(logprobs) / len(logprobs)


def share(a: list[int], b: list[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def test_metrics_equal_their_definitions() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    records = tiny_records(6)
    # A neighbour that another record edits.
    prompts = (records[1].request.text, records[0].locality_prompts[1])
    records[0] = replace(records[0], locality_prompts=prompts)
    untouched = tiny_model("llama")
    install_hooks(model, "calibrated")
    result = evaluate(model, tokenizer, records, batch_tokens=128)
    for record, found in zip(records, result.records, strict=True):
        request = record.request
        assert request.ground_truth is not None
        new, old = [], []
        for prompt in (request.text, *record.rephrase_prompts):
            new.append(by_hand(model, tokenizer, prompt, request.target_new))
            old.append(by_hand(model, tokenizer, prompt, request.ground_truth))
        accuracies = [share(predictions, ids) for ids, predictions, _ in new]
        wins = [float(a[2] > b[2]) for a, b in zip(new, old, strict=True)]
        assert found.reliability == accuracies[0]
        assert found.generality == sum(accuracies[1:]) / 2
        assert found.efficacy == wins[0]
        assert found.rome_paraphrase == sum(wins[1:]) / 2

        prompt, answer = record.locality_prompts[0], record.locality_answers[0]
        assert answer is not None
        before, after = (by_hand(one, tokenizer, prompt, answer) for one in (untouched, model))
        open_ids = tuple(tokenizer(record.locality_prompts[1])["input_ids"])
        same_next = plain_greedy(untouched, open_ids, 1) == plain_greedy(model, open_ids, 1)
        assert found.locality == (share(before[1], after[1]) + same_next) / 2
        kept = [share(before[1], after[1]), float(same_next)]
        named = [any(one.request.subject in text for one in records) for text in record.locality_prompts]
        unnamed = [value for value, one in zip(kept, named, strict=True) if not one]
        assert found.locality_unedited == (sum(unnamed) / len(unnamed) if unnamed else None)
        rival = by_hand(model, tokenizer, prompt, request.target_new)
        assert found.neighbourhood == float(after[2] > rival[2])

        matches = []
        for prompt in (request.text, *record.rephrase_prompts):
            prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, request.target_new)
            matches.append(plain_greedy(model, tuple(prompt_ids), len(target_ids)) == tuple(target_ids))
        assert found.generation == matches[0]
        assert found.generation_rephrase == sum(matches[1:]) / 2


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Hank Aaron plays", True),
        ("What does Hank Aaron play?", True),
        ("The sport of Hank Aaron", True),
        ("'Hank Aaron', they say", True),
        ("Hank Aarons play", False),
        ("unHank Aaron", False),
        ("hank aaron plays", False),
        ("Hank plays", False),
        ("Hey, Landlord! premieres on", True),
        ("Über uns", True),
        ("", False),
    ],
)
def test_which_texts_name_a_subject(text: str, found: bool) -> None:
    assert names_any(text, {"Hank Aaron", "Hey, Landlord!", "Über"}) is found
    assert not names_any(text, set())


def test_what_the_model_says_anyway_is_perfect() -> None:
    """A target from the model's own mouth has reliability and generation 1 without an edit."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()

    def own_word(prompt: str) -> str | None:
        """What the model says next, where it is a word that tokenises as the model said it."""
        ids = plain_greedy(model, tuple(tokenizer(prompt)["input_ids"]), 2)
        text = tokenizer.decode(ids)
        return text if text.strip() and encode_prompt_target(tokenizer, prompt, text)[1] == list(ids) else None

    said = {text: own_word(text) for text in (EditRequest(**fact).text for fact in tiny_facts(120))}
    prompt, target = next((prompt, word) for prompt, word in said.items() if word)
    record = EditRecord(EditRequest(prompt, prompt[-5:], target, "xyz"), (), ("The baker",), (None,))
    (found,) = evaluate(model, tokenizer, [record]).records
    assert (found.reliability, found.generation, found.efficacy, found.locality) == (1, 1, 1, 1)
    assert found.completion == target
    assert found.generality is None


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_evaluation_does_not_depend_on_the_batch(gate: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    install_hooks(model, gate)
    records = tiny_records(6)
    together = evaluate(model, tokenizer, records)
    single = evaluate(model, tokenizer, records, batch_tokens=1)
    assert together.records == single.records


def test_missing_answers_are_left_out_of_the_means() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    request = EditRequest("{} works as a", "Ada Vale", "pilot")
    bare = EditRecord(request)
    result = evaluate(model, tokenizer, [bare, *tiny_records(1)])
    assert result.records[0].efficacy is None
    assert result.records[0].locality is None
    assert result.summary()["efficacy"] == result.records[1].efficacy
    assert result.summary()["edits"] == 2
    nothing = evaluate(model, tokenizer, [bare], metrics=["accuracy"]).summary()
    assert nothing["locality"] is None
    assert nothing["harmonic_mean"] is None


def test_evaluate_rejects_bad_arguments() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="records is empty"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match=r"metrics must be among .* got \['beauty'\]"):
        evaluate(model, tokenizer, tiny_records(1), metrics=["accuracy", "beauty"])


def test_perplexity_of_base_is_measured_once() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    held_out = HeldOut(" ".join(tiny_texts(8)), window=32)
    expected = perplexity(model, tokenizer, held_out.text, window=32)
    records = tiny_records(2)
    install_hooks(model, "calibrated")
    base = BaseAnswers.collect(model, tokenizer, records)
    result = evaluate(model, tokenizer, records, base=base, metrics=["accuracy"], held_out=held_out)
    assert result.base_perplexity == pytest.approx(expected)
    assert result.perplexity is not None
    assert result.perplexity != pytest.approx(expected)
    assert result.summary()["perplexity_ratio"] == pytest.approx(result.perplexity / expected)
    assert list(base.perplexity) == [held_out.key]
    base.perplexity[held_out.key] = 7.0
    again = evaluate(model, tokenizer, records, base=base, metrics=["accuracy"], held_out=held_out)
    assert again.base_perplexity == 7.0


def test_base_answers_come_from_the_base_and_survive_a_file(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    records = tiny_records(4)
    before = BaseAnswers.collect(model, tokenizer, records)
    handle = install_hooks(model, "calibrated")
    with_hooks = BaseAnswers.collect(model, tokenizer, records)
    assert with_hooks == before
    assert [hook.mode for hook in handle.hooks] == ["gated", "gated"]
    before.perplexity["x"] = 3.5
    before.save(tmp_path / "deep" / "base.json")
    loaded = BaseAnswers.load(tmp_path / "deep" / "base.json")
    assert loaded == before
    loaded.check(model, records)
    with pytest.raises(ValueError, match="base answers belong to other records"):
        loaded.check(model, records[:3])
    with pytest.raises(ValueError, match="base answers belong to other model"):
        evaluate(tiny_model("llama", seed=1), tokenizer, records, base=loaded)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1, "model": "x"}', '{"model": "x"}'])
def test_broken_base_answers(tmp_path: Path, text: str) -> None:
    (tmp_path / "base.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold base answers"):
        BaseAnswers.load(tmp_path / "base.json")


# -------------------------------------------------------------------- results


def test_result_forms() -> None:
    records = [
        RecordResult(0, "a", "Ada, the first", reliability=1.0, generality=0.5, locality=1.0, completion="x\ny"),
        RecordResult(1, 7, "Bo", reliability=0.5, generality=0.5),
    ]
    result = Evaluation(records, perplexity=33.0, base_perplexity=30.0)
    summary = json.loads(result.to_json(details=False))
    assert (summary["reliability"], summary["generality"], summary["locality"]) == (0.75, 0.5, 1.0)
    assert summary["harmonic_mean"] == pytest.approx(3 / (1 / 0.75 + 2 + 1))
    assert summary["perplexity_ratio"] == pytest.approx(1.1)
    assert summary["rome_score"] is None
    assert json.loads(result.to_json())["records"][0]["subject"] == "Ada, the first"
    lines = result.to_csv().splitlines()
    assert lines[0].startswith("index,case_id,subject,reliability")
    values = dict(zip(lines[0].split(","), lines[1].replace("Ada, the first", "Ada").split(","), strict=False))
    assert (values["reliability"], values["generality"], values["locality"], values["leak"]) == (
        "1.0",
        "0.5",
        "1.0",
        "",
    )
    head, rule, cells, *_ = result.to_markdown().split("\n")
    assert "| reliability | locality | generality |" in head
    assert head.count("|") == rule.count("|") == cells.count("|")
    assert "| 0.750 | 1.000 | 0.500 |" in cells


def test_harmonic_mean() -> None:
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1.0, 0.0]) == 0
    assert harmonic_mean([1.0, None]) is None


def test_lm_eval_is_optional_and_gets_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'coachhook-fast\[lm-eval\]'"):
        run_tasks(model, tokenizer, ["arc_easy"])
    with pytest.raises(ValueError, match="tasks is empty"):
        run_tasks(model, tokenizer, [])
    seen: dict[str, Any] = {}

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return {"results": {"arc_easy": {"acc": 0.5}}}

    lm_eval, models, huggingface = (ModuleType(name) for name in ("lm_eval", "models", "huggingface"))
    lm_eval.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface.HFLM = lambda **options: SimpleNamespace(**options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setitem(sys.modules, "lm_eval.models", models)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", huggingface)
    assert run_tasks(model, tokenizer, ["arc_easy"], limit=4) == {"arc_easy": {"acc": 0.5}}
    assert seen["model"].pretrained is model
    assert seen["limit"] == 4


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_drift_equals_its_definition(gate: str) -> None:
    model, tokenizer, records = tiny_model("llama"), tiny_tokenizer(), tiny_records(3)
    handle = install_hooks(model, gate)

    def log_p(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text).input_ids])).logits[0, -1].double().log_softmax(-1)

    wanted = []
    for record in records:
        texts = [text.replace("{}", record.request.subject) for text in DRIFT_PROMPTS]
        after = [log_p(text) for text in texts]
        with handle.disabled():
            before = [log_p(text) for text in texts]
        wanted.append(sum(float((b.exp() * (b - a)).sum()) for a, b in zip(after, before, strict=True)) / len(texts))
    assert max(wanted) > 1e-4, "no text fires: the test compares zeros"
    for batch_tokens in (1, 40, 4096):
        found = evaluate(model, tokenizer, records, metrics=["drift"], batch_tokens=batch_tokens)
        assert [record.drift for record in found.records] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    with handle.disabled():
        assert evaluate(model, tokenizer, records, metrics=["drift"]).summary()["drift"] == 0
