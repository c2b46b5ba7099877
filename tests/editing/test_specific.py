"""Edits that are specific: wordings, prompts to keep, earlier facts of a subject, and normalised descent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast.chat import answer_bounds
from coachhook_fast.config import PAPER, EditConfig
from coachhook_fast.editing.keys import bare_outputs
from coachhook_fast.editing.targets.descent import NormalisedDescent
from coachhook_fast.editing.targets.optimise import FURTHER_STEPS, KEPT_A_STEP, STEP_SHARE, optimise
from coachhook_fast.editing.targets.wordings import Wordings, as_asked, read_wordings
from coachhook_fast.edits.edit_set import LayerUpdate
from coachhook_fast.models.architectures import layout_of
from coachhook_fast.models.passes.forward import PartialModel, frozen
from coachhook_fast.request import EditRequest, TokenisedRequest, TokenRow, prompt_row, tokenise_batch

SPECIFIC: dict[str, Any] = {"specific": True, "v_lr": None, "found_paraphrases": 2, "found_keep": 12}


def test_descent_is_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    count, width, steps = 5, 7, 6
    lengths, bounds = torch.rand(count) + 0.1, torch.rand(count) + 0.2
    descent = NormalisedDescent(lengths, bounds, width, steps)
    rows, mean = torch.zeros(count, width), torch.zeros(count, width)
    going = torch.tensor([True, True, False, True, True])
    for step in range(steps + 3):
        gradients = torch.randn(count, width)
        descent.step(gradients, going)
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * step / (steps - 1))) / 2 if step < steps else 0.4
        for row in range(count):
            mean[row] = 0.5 * mean[row] + 0.5 * gradients[row]
            if going[row]:
                moved = rows[row] - lengths[row] * share * mean[row] / mean[row].norm()
                rows[row] = moved * min(1.0, float(bounds[row] / moved.norm()))
    torch.testing.assert_close(descent.rows.detach(), rows)
    assert bool((descent.rows[2] == 0).all())


KEEP = (
    "Some say that {} was born in",
    "It seems that {} lives in",
    "We know that {} died in",
    "So {} speaks",
    "Then {}",
)
WORDINGS = ("They say that {} works as a", "The job of {} is")
EARLIER = EditRequest("It is said that {} came from", "Ada Vale", "north sea")


def plain_value(model: Any, block: Any, tokens: TokenisedRequest, config: EditConfig) -> tuple[torch.Tensor, int]:
    """v* of one request by the definition: whole model, whole texts, each of them alone, every prompt to keep that the
    step has."""
    v0: list[torch.Tensor] = []

    def log_p(row: TokenRow, delta: torch.Tensor | None) -> torch.Tensor:
        def shift(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if not v0:
                v0.append(hidden[0, row.lookup].detach().clone())
            if delta is not None:
                hidden = hidden.clone()
                hidden[0, row.lookup] = hidden[0, row.lookup] + delta
            return (hidden,) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(shift)
        try:
            return model(torch.tensor([row.prompt + row.target])).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    def at_target(row: TokenRow, delta: torch.Tensor) -> torch.Tensor:
        return log_p(row, delta)[len(row.prompt) - 1 : -1]

    kept = [(tokens.kl, tokens.kl.lookup), *((row, len(row.prompt) - 1) for row in tokens.keep)]
    with torch.no_grad():
        log_p(tokens.bare, None)
        clean = [log_p(row, None)[place] for row, place in kept]
    length, planned = float(v0[0].norm()), config.v_num_grad_steps
    parts = max(1, math.ceil(config.found_keep / KEPT_A_STEP))
    delta, mean = torch.zeros_like(v0[0], requires_grad=True), torch.zeros_like(v0[0])
    for step in range(FURTHER_STEPS * planned):
        share = len(tokens.asking)
        predicted = [at_target(row, delta) for row in (*tokens.asking, *tokens.held)]
        loss = config.v_weight_decay * delta.norm() / length**2
        for row, found in zip((*tokens.asking, *tokens.held), predicted, strict=True):
            loss = loss - found.gather(1, torch.tensor(row.target)[:, None]).mean() / share
        for number, ((row, place), before) in enumerate(zip(kept, clean, strict=True), -1):
            if number >= 0 and number % parts != step % parts:
                continue
            weight = config.kl_factor if number < 0 else parts * config.keep_factor / len(tokens.keep)
            loss = loss + weight * (before.exp() * (before - log_p(row, delta)[place])).sum()
        said = predicted[len(tokens.rows) - 1].argmax(-1).tolist() == list(tokens.bare.target)
        if loss < config.v_loss_threshold or (said and step >= planned):
            return (v0[0] + delta).detach(), step
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            mean = 0.5 * mean + 0.5 * gradient
            rate = 0.1 + 0.45 * (1 + math.cos(math.pi * step / (planned - 1))) if step < planned else 0.4
            moved = delta - STEP_SHARE * length * rate * mean / mean.norm()
            delta = (moved * min(1.0, config.clamp_norm_factor * length / float(moved.norm()))).requires_grad_()
    return (v0[0] + delta).detach(), FURTHER_STEPS * planned


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_values_are_those_of_the_plain_definition_however_requests_are_grouped(family: str) -> None:
    model, tokenizer = tiny_model(family, dtype=torch.float64), tiny_tokenizer()
    config = EditConfig(**SPECIFIC, v_num_grad_steps=5, v_loss_threshold=0.0, keep_factor=0.5, clamp_norm_factor=20.0)
    partial, last = PartialModel(model, layout_of(model)), 2
    # Where the subject ends the prompt δ stands where the target is read, and has it said sooner or later.
    ending = EditRequest("They say it was {}", "Bo Lind", "the")
    batch = [request.tokenise(tokenizer, ["The old town"]) for request in (*facts(2), ending)]
    batch.append(
        EditRequest("It is said that {} works as a", "Ada Vale", "north sea", paraphrases=WORDINGS[:1], keep=KEEP)
        .tokenise(tokenizer, ["The old town"], paraphrases=WORDINGS[1:], keep=KEEP[::-1], earlier=[EARLIER])
    )  # fmt: skip
    with frozen(model):
        v0 = bare_outputs(partial, last, batch, pad_id=0, max_tokens=400)
        found = optimise(partial, last, batch, v0, config, pad_id=0, whole_rows=False)
        alone = optimise(partial, last, batch, v0, config, pad_id=0, whole_rows=False, only=[3])
        wanted = [plain_value(model, partial.blocks[last], tokens, config) for tokens in batch]
    assert [target.steps for target in found] == [steps for _, steps in wanted]
    assert len({target.steps for target in found}) > 1, "no target is said in further steps, or all are"
    for target, (value, _) in zip(found, wanted, strict=True):
        assert float((target.value - value).norm() / value.norm()) < 1e-8
    assert float((found[3].value - alone[0].value).norm() / alone[0].value.norm()) < 1e-8


def test_nothing_is_kept_that_the_batch_asks_about_the_subject() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wordings = Wordings(PartialModel(model, layout_of(model)), tokenizer, "tiny", pad_id=0)
    work = EditRequest("{} works as a", "Ada Vale", "pilot", paraphrases=["The home of {} is in"])
    birth = EditRequest("{} was born in", "ada vale", "Oslo")
    (paraphrases, keep), _ = wordings.find([work, birth], paraphrases=3, keep=500)
    asked = [
        wording for wording in wordings.bank if wording.text in ("The home of {} is in", birth.prompt, work.prompt)
    ]
    same = {
        wording.text
        for wording in (*wordings.bank, *wordings.questions)
        if (wording.kind, wording.relation) in {(one.kind, one.relation) for one in asked}
    }
    assert keep
    assert not same & set(keep)
    assert len(paraphrases) <= 2
    assert not {work.prompt, *work.paraphrases} & set(paraphrases)
    assert wordings.find([work, birth], paraphrases=3, keep=500)[0] == (paraphrases, keep)  # nothing is drawn anew


def test_every_wording_has_one_slot_and_no_two_are_alike_in_one_question() -> None:
    bank = read_wordings()
    assert len(bank) > 200
    assert all(wording.text.count("{}") == 1 for wording in bank)
    assert len({(wording.kind, wording.relation, wording.text) for wording in bank}) == len(bank)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("paraphrases", "text", TypeError),
        ("paraphrases", [1], TypeError),
        ("keep", ["  "], ValueError),
        ("keep", ["nobody is here"], ValueError),
        ("paraphrases", ["{} and {}"], ValueError),
        ("keep", ["{} works as a"], ValueError),
        ("keep", ["{} is \ud800"], ValueError),
    ],
)
def test_other_prompts_are_checked_like_the_prompt(name: str, value: Any, error: type[Exception]) -> None:
    fact: dict[str, Any] = {"prompt": "{} works as a", "subject": "Ada Vale", "target_new": "pilot"}
    with pytest.raises(error, match=name):
        EditRequest(**fact, **{name: value})


def test_earlier_facts_of_a_subject_are_held_but_not_those_asked_anew() -> None:
    tokenizer = tiny_tokenizer()
    old = [
        EditRequest("It is said that {} works as a", "Ada Vale", "pilot"),
        EditRequest("It is said that {} was born in", "Ada Vale", "Oslo"),
        EditRequest("It is said that {} was born in", "Bo Lind", "Rome"),
    ]
    new = EditRequest("It is said that {} works as a", "ada  vale", "baker")
    other = EditRequest("It is said that {} works as a", "Cy Dorn", "baker")
    mine, others = tokenise_batch([new, other], tokenizer, ["So"], None, earlier=old)
    assert [row.target for row in mine.held] == [old[1].tokenise(tokenizer, []).bare.target]
    assert others.held == ()


def test_edits_are_specific_unless_adam_is_asked_for() -> None:
    default = EditConfig().resolved(30, 1536)
    assert (default.specific, default.found_paraphrases, default.found_keep) == (True, 3, 12)
    assert default.layers == tuple(range(7, 16))
    for settings in ({"v_lr": 0.5}, {"specific": False}, PAPER):
        other = EditConfig(**settings).resolved(30, 1536)
        assert (other.specific, other.found_paraphrases, other.found_keep) == (False, 0, 0)
    assert EditConfig(v_lr=0.5, found_keep=4).resolved(30, 1536).found_keep == 4
    with pytest.raises(ValueError, match="v_lr"):
        EditConfig(specific=True, v_lr=0.5)


def test_paper_names_all_that_was_published() -> None:
    paper = EditConfig.paper().resolved(28, 16384)
    assert EditConfig(**PAPER).resolved(28, 16384) == paper
    assert (paper.gate, paper.alpha, paper.mom2_update_weight, paper.round_robin) == ("sequence", 2.2, 15_000.0, 1)
    assert (paper.v_lr, paper.v_num_grad_steps, paper.hard_negatives) == (0.5, 25, 0)


def test_a_specific_edit_goes_in_and_says_what_is_said() -> None:
    editor = make(config=CONFIG.replace(**SPECIFIC, v_num_grad_steps=4))
    base = logits(editor.model)
    batch = edit(editor, facts(3))
    for outcome in batch.outcomes:
        assert outcome.said in (True, False)
        assert outcome.said is False or outcome.answer.strip() == outcome.request.target_new
        assert outcome.said_paraphrases is None or 0 <= outcome.said_paraphrases <= 1
    editor.rollback(batch.id)
    assert torch.equal(logits(editor.model), base)


def test_a_specific_edit_goes_in_whole() -> None:
    """Δk of a request's own key is all of what its layer lacked, however little room C leaves; Adam's is a share."""
    left = {}
    for settings in ({}, SPECIFIC):
        config = CONFIG.replace(**settings, v_num_grad_steps=2, mom2_update_weight=5.0, layers=(2,), keep_factor=0.5)
        editor, seen = make(config=config), {}
        edit(editor, facts(3), observer=lambda event, layer, seen=seen, **found: seen.update({event: found}))
        update = editor.ledger[0].layers[0]
        K, wanted = update.keys[:, :3].double(), seen["values"]["V"]
        given = update.residuals.double() @ (update.directions.double().T @ K)
        with editor.disabled(), frozen(editor.model):
            tokens = tokenise_batch(facts(3), editor.tokenizer, editor.edit_set.contexts, None)
            lacked = wanted - bare_outputs(editor.partial, 2, tokens, pad_id=0, max_tokens=400)
        left[bool(settings)] = float((given - lacked).norm() / lacked.norm())
    assert left[True] < 1e-5
    assert left[False] > 1e-2


def test_the_key_of_an_unchanged_fact_sets_no_threshold() -> None:
    torch.manual_seed(0)
    d, m = 12, 6
    K = torch.randn(d, 4)
    X = K[:, :3] @ torch.linalg.inv(K[:, :3].T @ K[:, :3])  # the layer answers each of its keys with its residual
    R = torch.randn(m, 3)
    R[:, 1] = 1e-6
    update = LayerUpdate(K, R, X, requests=(2, 0, 1, 3))
    torch.testing.assert_close(update.changed_keys, K[:, [0, 2]])
    assert LayerUpdate(K, R[:, :0], X[:, :0]).changed_keys.shape == (d, 0)


class Chatting:
    """A tokenizer with a chat template, as far as `as_asked` asks it."""

    chat_template, bos_token, bos_token_id = "yes", "<s>", 1

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 5] if self.adds_bos else [5]}

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        assert add_generation_prompt
        return f"<s>[user] {messages[0]['content']}\n[assistant]\n"


def test_a_question_is_read_as_somebody_asks_it() -> None:
    assert as_asked(tiny_tokenizer(), "Where was {} born?") == "Question: Where was {} born?\nAnswer:"
    assert as_asked(Chatting(False), "Where was {} born?") == "<s>[user] Where was {} born?\n[assistant]\n"
    # Tokenising puts the beginning there a second time, unless it is taken off.
    assert as_asked(Chatting(True), "Where was {} born?") == "[user] Where was {} born?\n[assistant]\n"


def test_every_third_paraphrase_is_a_question() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wordings = Wordings(PartialModel(model, layout_of(model)), tokenizer, "tiny", pad_id=0)
    ((paraphrases, _),) = wordings.find([EditRequest("{} works as a", "Ada Vale", "pilot")], paraphrases=3, keep=0)
    first, second, third = paraphrases
    assert not first.startswith("{}")
    assert second.startswith("{}")
    assert third == "Question: What is the occupation of {}?\nAnswer:"


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_answer_in_a_chat_ends() -> None:
    tokenizer = tiny_tokenizer()
    assert answer_bounds(tokenizer) is None
    tokenizer.chat_template = CHAT
    assert answer_bounds(tokenizer) == ("<assistant>", "<end>")
    prompt = as_asked(tokenizer, "Where was {} born?")
    assert prompt == "<user>Where was {} born?\n<assistant>"
    row = prompt_row(tokenizer, prompt, "Ada Vale", "Oslo")
    assert tokenizer.decode(row.target).replace(" ", "") == "Oslo<end>"
    assert prompt_row(tokenizer, "{} was born in", "Ada Vale", "Oslo").target == tuple(
        tokenizer(" Oslo", add_special_tokens=False)["input_ids"]
    )
    tokenizer.chat_template = "{{ messages[0].content }}"  # nothing tells where an answer begins
    assert answer_bounds(tokenizer) is None


def test_the_bank_is_read_once_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    partial, request = PartialModel(model, layout_of(model)), EditRequest("{} works as a", "Ada Vale", "pilot")

    def found(model_id: str = "one") -> Any:
        return Wordings(partial, tokenizer, model_id, pad_id=0).find([request], paraphrases=3, keep=9)

    wanted = found()
    (file,) = tmp_path.rglob("*.safetensors")
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        passes: list[int] = []
        run = partial.run
        patch.setattr(partial, "run", lambda *a, **k: (passes.append(1), run(*a, **k))[1])
        assert found() == wanted
        assert len(passes) == 1, "only the prompt is read"
    assert found("another") == wanted
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    file.write_bytes(before[:1000])  # a copy that was cut off
    with pytest.warns(UserWarning, match="states are found anew"):
        assert found() == wanted
    assert file.read_bytes() == before
