"""Scores: batched equals single, sharing rows changes nothing, every metric equals its definition written out."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import BOS, tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.architectures import layout_of
from coachhook_fast.datasets import EditRecord
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.evaluate import (
    BaseAnswers,
    Evaluation,
    HeldOut,
    Pair,
    RecordResult,
    complete,
    evaluate,
    fluency,
    perplexity,
    score_pairs,
)
from coachhook_fast.evaluate.generation import continue_greedily, ngram_entropy
from coachhook_fast.evaluate.harness import run_tasks
from coachhook_fast.evaluate.result import harmonic_mean
from coachhook_fast.evaluate.scoring import _plan_rows
from coachhook_fast.hooks import Hooks
from coachhook_fast.request import EditRequest, encode_prompt_target

FAMILIES = ("gpt2", "llama", "gemma3", "phi3")


def random_pairs(n: int, *, seed: int = 0) -> list[Pair]:
    """Pairs of 3 to 20 prompt tokens and 1 to 4 target tokens; every other one repeats the prompt before."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(3, 320, (length,), generator=generator).tolist())

    pairs: list[Pair] = []
    for index in range(n):
        prompt = pairs[-1].prompt if index % 2 else ids(3, 20)
        pairs.append(Pair(prompt, ids(1, 4)))
    return pairs


def install_hooks(model: Any, gate: str) -> Hooks:
    """Random rank-2 edits in two layers, with thresholds that some tokens pass and some do not."""
    layout = layout_of(model)
    handle = Hooks(model, layout, (1, 2), gate)
    torch.manual_seed(5)
    for hook in handle.hooks:
        update = torch.randn(hook.out_features, 2), torch.randn(hook.in_features, 2) / hook.in_features**0.5
        delta = LowRankDelta.zeros(hook.out_features, hook.in_features).append(*update)
        hook.set_delta(delta, 1.0 if gate == "sequence" else 1.5)
    return handle


def plain_scores(model: Any, pair: Pair, *, whole: bool = False) -> tuple[list[int], list[float]]:
    """One pair, one unpadded pass, all logits. Feeding the last token matters to the `sequence` gate only."""
    row = pair.prompt + (pair.target if whole else pair.target[:-1])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
    at = range(len(pair.prompt) - 1, len(pair.prompt) + len(pair.target) - 1)
    return [int(logits[p].argmax()) for p in at], [float(logits[p, t]) for p, t in zip(at, pair.target, strict=True)]


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_single(family: str, batch_tokens: int) -> None:
    model = tiny_model(family)
    pairs = random_pairs(12)
    for pair, score in zip(pairs, score_pairs(model, pairs, batch_tokens=batch_tokens), strict=True):
        predictions, logprobs = plain_scores(model, pair)
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("gate", ["calibrated", "sequence"])
def test_batched_equals_single_under_hooks(gate: str) -> None:
    model = tiny_model("llama")
    base = score_pairs(model, random_pairs(12))
    install_hooks(model, gate)
    scores = score_pairs(model, random_pairs(12), batch_tokens=96)
    assert scores != base
    for pair, score in zip(random_pairs(12), scores, strict=True):
        predictions, logprobs = plain_scores(model, pair, whole=gate == "sequence")
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_a_row_serves_every_pair_that_begins_it() -> None:
    pairs = [
        Pair((5, 6), (7,)),  # fed: 5 6
        Pair((5, 6), (8,)),  # fed: 5 6
        Pair((5, 6), (7, 8, 9)),  # fed: 5 6 7 8
        Pair((5, 6, 7), (3,)),  # fed: 5 6 7
        Pair((5, 9), (7,)),  # fed: 5 9
    ]
    rows = _plan_rows(pairs, whole=False)
    assert [(row.tokens, sorted(row.pairs), row.first) for row in rows] == [
        ((5, 6, 7, 8), [0, 1, 2, 3], 1),
        ((5, 9), [4], 1),
    ]
    assert len(_plan_rows(pairs, whole=True)) == len(pairs)
    model = tiny_model("qwen3")
    for pair, score in zip(pairs, score_pairs(model, pairs), strict=True):
        predictions, logprobs = plain_scores(model, pair)
        assert list(score.predictions) == predictions
        assert score.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_only_wanted_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    computed = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: computed.append(args[0].shape[:2]))
    pairs = [Pair(tuple(range(3, 33)), (5,)), Pair(tuple(range(40, 70)), (6, 7))]
    score_pairs(model, pairs)
    assert sum(rows * columns for rows, columns in computed) <= 4


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([Pair((), (1,))], r"pairs\[0\] needs a prompt and a target"),
        ([Pair((1,), (1,)), Pair((1,), ())], r"pairs\[1\] needs a prompt and a target"),
        ([Pair((1,) * 300, (1,))], r"pairs\[0\] has 301 tokens, the model's context is 256"),
    ],
)
def test_bad_pairs(pairs: list[Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_pairs(tiny_model("llama"), pairs)


def test_bad_batch_tokens() -> None:
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, got 0"):
        score_pairs(tiny_model("llama"), random_pairs(1), batch_tokens=0)


# -------------------------------------------------------------------- generation


def plain_greedy(model: Any, prompt: tuple[int, ...], length: int) -> tuple[int, ...]:
    """No cache, no padding; ends before EOS."""
    row = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
        if token == model.config.eos_token_id:
            break
        row.append(token)
    return tuple(row[len(prompt) :])


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_generation_equals_single(family: str, hooked: bool) -> None:
    model = tiny_model(family)
    if hooked:
        install_hooks(model, "calibrated")
    prompts = [pair.prompt for pair in random_pairs(8)]
    lengths = [1 + index % 5 for index in range(8)]
    written = continue_greedily(model, prompts, lengths, batch_tokens=60)
    assert written == [plain_greedy(model, *one) for one in zip(prompts, lengths, strict=True)]


def test_generation_ignores_the_models_own_sampling_settings() -> None:
    model = tiny_model("llama")
    prompts = [pair.prompt for pair in random_pairs(3)]
    plain = continue_greedily(model, prompts, [12] * 3)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert continue_greedily(model, prompts, [12] * 3) == plain


def test_bad_generation_arguments() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        continue_greedily(model, [(1,)], [1, 1])
    with pytest.raises(ValueError, match=r"prompts\[0\] needs a token and a length >= 1, got \(1,\) and 0"):
        continue_greedily(model, [(1,)], [0])


def test_complete_returns_text() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    (text,) = complete(model, tokenizer, ["Ada Vale works as a"], max_new_tokens=4)
    ids = tuple(tokenizer("Ada Vale works as a")["input_ids"])
    assert text == tokenizer.decode(plain_greedy(model, ids, 4), skip_special_tokens=True)


def test_ngram_entropy_by_hand() -> None:
    # a b a b: bigrams ab ba ab -> H = .918; trigrams aba bab -> H = 1
    bigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    assert ngram_entropy("the the the the the") == 0
    assert ngram_entropy("") == 0
    assert ngram_entropy("word") == 0


def test_fluency_does_not_depend_on_the_batch() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = tiny_texts(4)
    together = fluency(model, tokenizer, prompts, max_new_tokens=20)
    assert fluency(model, tokenizer, prompts, max_new_tokens=20, batch_tokens=1) == together
    assert fluency(model, tokenizer, prompts, max_new_tokens=20, seed=1) != together
    assert all(value > 0 for value in together)


# -------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 16), (16, 5), (50, 20), (4096, None)])
def test_perplexity_equals_its_definition(bos: bool, window: int, stride: int | None) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(bos=bos)
    text = " ".join(tiny_texts(6))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:150]
    window_used = min(window, 256)
    begin = [BOS] if bos else []
    body = window_used - len(begin)
    losses: dict[int, float] = {}  # each token's, from the first window that can score it
    start = 0
    while True:
        row = begin + ids[start : start + body]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        for offset in range(1, len(row)):
            losses.setdefault(start + offset - len(begin), -float(logs[offset - 1, row[offset]]))
        if start + body >= len(ids):
            break
        start += min(stride or window_used, body)
    expected = math.exp(sum(losses.values()) / len(losses))
    options: dict[str, Any] = {"window": window, "stride": stride, "max_tokens": 150}
    assert perplexity(model, tokenizer, text, **options) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, text, batch_tokens=1, **options) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window must be at least 2 and stride in 1..window, got 1 and 1"),
        ({"window": 8, "stride": 9}, "got 8 and 9"),
        ({"max_tokens": 1}, "text must have two tokens or more, got 1"),
    ],
)
def test_bad_perplexity_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(tiny_model("llama"), tiny_tokenizer(), "some text", **options)


# -------------------------------------------------------------------- metrics


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
        assert found.paraphrase == sum(wins[1:]) / 2

        prompt, answer = record.locality_prompts[0], record.locality_answers[0]
        assert answer is not None
        before, after = (by_hand(one, tokenizer, prompt, answer) for one in (untouched, model))
        open_ids = tuple(tokenizer(record.locality_prompts[1])["input_ids"])
        same_next = plain_greedy(untouched, open_ids, 1) == plain_greedy(model, open_ids, 1)
        assert found.locality == (share(before[1], after[1]) + same_next) / 2
        rival = by_hand(model, tokenizer, prompt, request.target_new)
        assert found.neighbourhood == float(after[2] > rival[2])

        matches = []
        for prompt in (request.text, *record.rephrase_prompts):
            prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, request.target_new)
            matches.append(plain_greedy(model, tuple(prompt_ids), len(target_ids)) == tuple(target_ids))
        assert found.generation == matches[0]
        assert found.generation_rephrase == sum(matches[1:]) / 2


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
    assert lines[1].startswith('0,a,"Ada, the first",1.0,0.5,1.0')
    head, rule, cells, *_ = result.to_markdown().split("\n")
    assert "| reliability | generality | locality |" in head
    assert head.count("|") == rule.count("|") == cells.count("|")
    assert "| 0.750 | 0.500 | 1.000 |" in cells


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
