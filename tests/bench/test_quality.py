"""The quality harness: every method's state survives interruption, and each baseline does what its page says."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, EditRequest, EditWarning
from coachhook_fast.evaluate import EditRecord, HeldOut
from coachhook_fast.evaluate.datasets import read_records
from coachhook_fast.evaluate.scoring import looks_ahead

BENCH = str(Path(__file__).resolve().parents[2] / "bench")
if BENCH not in sys.path:
    sys.path.append(BENCH)
quality: Any = importlib.import_module("quality")
records: Any = importlib.import_module("quality_records")
common: Any = importlib.import_module("baselines.common")

CONFIG = EditConfig(
    layers=(1, 2), v_num_grad_steps=3, v_lr=0.3, clamp_norm_factor=3.0, mom2_update_weight=5.0, context_tokens=3,
    context_seeds=("The",), threshold_keys=64, stats_sequence_length=48, threshold_rule="zscore", threshold_z=1.0,
)  # fmt: skip
# With the quick settings for all: 25 steps on a random model also blow up the last digits of fp32.
METHODS = {
    method.title: replace(method, settings=tuple(pair for pair in method.settings if pair[0] == "gate"))
    for method in quality.METHODS
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, facts with paraphrase and neighbour, and a corpus."""
    folder = tmp_path_factory.mktemp("quality")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    facts = tiny_facts(7)
    for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True):
        subject = fact["subject"]
        fact |= {"rephrase_prompt": f"{subject} is a", "locality_prompt": other["prompt"].format(other["subject"])}
        fact |= {"prompt": fact["prompt"].format(subject), "locality_ground_truth": other["ground_truth"]}
        fact |= {"paraphrases": [f"People say that {subject} is a", f"At work, {subject} is a"], "relation": "P106"}
        fact["same_subject"] = [{"prompt": f"{subject} met", "answer": "a clerk"}]
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "corpus.txt").write_text("\n\n".join(tiny_texts(12)))
    return folder


def plan(home: Path, work: Path, at: tuple[int, ...] = (2, 5)) -> Any:
    return quality.Plan(
        model=str(home / "model"), config=CONFIG, records=read_records(home / "facts.json"), batch_size=2, at=at,
        corpus=home / "corpus.txt", held_out=HeldOut(tiny_texts(2)[0], window=16), work=work,
    )  # fmt: skip


def rows_of(method: Any, settings: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)
        quality.run(method, settings, rows.append)
    return rows


UNTIMED = {"seconds_per_edit": None, "evaluation_seconds": None}


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Without times, and numbers but for the last digits of fp32, which a tensor's place in memory can move."""

    def near(value: Any) -> Any:
        return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value

    layers = [{name: near(value) for name, value in layer.items()} for layer in row["layers"]]
    kinds = {name: near(value) for name, value in row["kinds"].items()}
    return {name: near(value) for name, value in row.items()} | {"layers": layers, "kinds": kinds} | UNTIMED


class _Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in METHODS if title != "coachhook-fast/none"])
def test_an_interrupted_run_ends_with_the_same_rows(
    home: Path, tmp_path: Path, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[title]
    whole = rows_of(method, plan(home, tmp_path / "whole"))
    assert [row["edits"] for row in whole] == [2, 5]
    # The third batch saves half of its state and dies.
    runner_type: Any = method.make
    save = runner_type.save

    def dying(self: Any, folder: Path) -> None:
        save(self, folder)
        if folder.name == "000005":
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(runner_type, "save", dying)
        with pytest.raises(_Killed):
            rows_of(method, plan(home, tmp_path / "cut"))
    resumed = rows_of(method, plan(home, tmp_path / "cut"))
    assert [row | UNTIMED for row in resumed] == [comparable(row) for row in whole]


@pytest.mark.slow
def test_the_ungated_row_shares_the_gated_runs_edits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gated = rows_of(METHODS["coachhook-fast/calibrated"], plan(home, tmp_path))
    monkeypatch.setattr(quality.Ours, "edit", None)  # nothing is edited again
    free = rows_of(METHODS["coachhook-fast/none"], plan(home, tmp_path))
    assert [row["layers"] for row in free] == [row["layers"] for row in gated]


@pytest.mark.slow
def test_another_text_measures_perplexity_alone_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS["coachhook-fast/calibrated"]
    before = rows_of(method, plan(home, tmp_path))
    longer = replace(plan(home, tmp_path), held_out=HeldOut("\n".join(tiny_texts(4)), window=16, max_tokens=90))
    with monkeypatch.context() as patched:
        patched.setattr(quality.Ours, "edit", None)  # nothing is edited again, and no prompt scored
        patched.setattr(quality.BaseAnswers, "collect", None)
        after = rows_of(method, longer)
    assert [row["held_out_tokens"] for row in after] == [90, 90]
    assert all(a["perplexity_ratio"] != b["perplexity_ratio"] for a, b in zip(after, before, strict=True))
    about_the_text = {"perplexity_ratio", "held_out", "held_out_tokens"}
    for a, b in zip(after, before, strict=True):
        assert {name: value for name, value in a.items() if name not in about_the_text} == {
            name: value for name, value in b.items() if name not in about_the_text
        }
    fresh = rows_of(method, replace(longer, work=tmp_path / "fresh"))
    assert [row["perplexity_ratio"] for row in after] == [pytest.approx(row["perplexity_ratio"]) for row in fresh]


@pytest.mark.slow
def test_a_stored_row_without_a_metric_is_evaluated_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS["finetune/none"]
    few = replace(plan(home, tmp_path), metrics=("accuracy",))
    before = rows_of(method, few)
    assert before[0]["paraphrase"] is None
    monkeypatch.setattr(method.make, "edit", None)  # nothing is edited again
    after = rows_of(method, plan(home, tmp_path))
    assert all(row["fact_score"] is not None and row["said_question"] is not None for row in after)
    assert [row["reliability"] for row in after] == [pytest.approx(row["reliability"]) for row in before]
    stored = json.loads((tmp_path / "rows" / f"{few.run_key(method)}-none.json").read_text())
    assert set(quality.Plan.metrics) == set(stored["2"]["metrics"])


def test_the_unedited_model_has_a_row(home: Path, tmp_path: Path) -> None:
    (row,) = rows_of(METHODS["unedited/none"], plan(home, tmp_path, at=(3,)))
    assert (row["same_subject"], row["locality"], row["leak"], row["leak_passing"]) == (1, 1, 0, 0)
    assert row["perplexity_ratio"] == pytest.approx(1)
    assert set(quality.SCORES) <= set(row)


def test_which_facts_are_edited(home: Path) -> None:
    facts = read_records(home / "facts.json")
    many = [EditRecord(EditRequest(**fact)) for fact in tiny_facts(40)]
    for half, rest in (("A", 1), ("B", 2)):
        subjects = [one.request.subject for one in records.choose(many, half=half)]
        assert {int(hashlib.sha256(name.encode()).hexdigest(), 16) % 3 for name in subjects} == {rest}
    assert records.choose(facts) == facts
    assert records.choose(facts, strict=True) == []  # one other fact of each subject
    more = [replace(one, same_subject=one.same_subject * 2) for one in facts[:3]]
    assert records.choose([*more, *facts], strict=True) == more
    assert records.choose(facts, form="question") == []
    shuffled = records.choose(facts, seed=7)
    assert shuffled != facts
    assert sorted(map(facts.index, shuffled)) == list(range(7))
    assert records.choose(facts, seed=7) == shuffled


def test_paraphrases_that_are_given_are_not_scored(home: Path) -> None:
    fact = read_records(home / "facts.json")[0]
    assert records.give(fact, 0) == fact
    told = records.give(fact, 1)
    assert told.request.paraphrases == fact.paraphrases[:1]
    assert told.paraphrases == fact.paraphrases[1:]
    assert records.facts_key([told]) != records.facts_key([fact])


@pytest.mark.slow
def test_the_command_writes_every_form(home: Path, tmp_path: Path) -> None:
    settings = [f"{name}={json.dumps(value)}" for name, value in CONFIG.to_dict().items() if value is not None]
    quality.main(
        [
            "--model", str(home / "model"), "--facts", str(home / "facts.json"), "--corpus", str(home / "corpus.txt"),
            "--held-out", str(home / "corpus.txt"), "--at", "2", "--batch-size", "2", "--work", str(tmp_path / "work"),
            "--methods", "finetune/none,memit/none", "--out", str(tmp_path / "table"), "--seed", "1",
            *(part for one in settings for part in ("--set", one)),
        ]
    )  # fmt: skip
    short = [
        "--model",
        str(home / "model"),
        "--facts",
        str(home / "facts.json"),
        "--skip",
        "6",
        "--at",
        "2",
        "--out",
        "x",
    ]
    with pytest.raises(SystemExit, match="holds 1 such facts behind --skip"):
        quality.main(short)
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["method"] for row in rows] == ["memit", "finetune"]  # the table's order, ours first where it is there
    for row in rows:
        assert set(quality.COLUMNS) <= set(row)
        assert row["versions"]["torch"] == torch.__version__
        assert row["perplexity_ratio"] > 0
    assert (tmp_path / "table.csv").read_text().splitlines()[0].startswith("method,gate,edits")
    assert (tmp_path / "table.md").read_text().count("\n") == 4


@pytest.mark.slow
def test_rows_say_how_far_edits_stand_from_ordinary_text(home: Path, tmp_path: Path) -> None:
    rows = rows_of(METHODS["coachhook-fast/calibrated"], plan(home, tmp_path))
    for layer in (layer for row in rows for layer in row["layers"]):
        assert layer["own_z_min"] <= layer["own_z_05"] <= layer["own_z_max"]
        # 64 keys: z = 1 lets some ordinary ones through, and counts those at or above it.
        assert layer["threshold_z"] == pytest.approx(1.0, abs=1e-4)
        assert layer["ordinary_z_50"] < 1.0 < layer["ordinary_z_max"]
        assert 1 / 64 <= layer["fire_rate"] < 0.5
        assert layer["fire_rate"] * 64 == pytest.approx(round(layer["fire_rate"] * 64))
    pytest.importorskip("matplotlib")
    draw = importlib.import_module("quality_figures").draw
    draw(rows, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert (tmp_path / "table-gate.png").stat().st_size > 10_000


@pytest.mark.parametrize("title", ["memit/none", "alphaedit/none", "finetune/none", "published/published"])
def test_a_baseline_edits_and_gives_the_model_back(home: Path, title: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    ids = torch.tensor([tokenizer("By trade, Clara Quill is a").input_ids])
    with torch.no_grad():
        before = model(ids).logits
    runner: Any = METHODS[title].make(model, tokenizer, CONFIG, tiny_texts(12))
    runner.edit([EditRequest(**fact) for fact in tiny_facts(3)])
    assert all(float(module.delta.norm()) > 0 for module in runner.added)
    assert looks_ahead(model) == (title == "published/published")
    with torch.no_grad():
        with runner.disabled():
            assert torch.equal(model(ids).logits, before)
        assert title == "published/published" or not torch.equal(model(ids).logits, before)
        runner.unload()
        assert torch.equal(model(ids).logits, before)


def test_alphaedit_stays_in_the_null_space() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    runner: Any = METHODS["alphaedit/none"].make(model, tokenizer, CONFIG, tiny_texts(12))
    runner.edit([EditRequest(**fact) for fact in tiny_facts(3)])
    for module, projection in zip(runner.added, runner.projections, strict=True):
        assert 0 < int(projection.trace().round()) < projection.shape[0]
        torch.testing.assert_close(module.delta.double() @ projection, module.delta.double(), rtol=1e-4, atol=1e-6)


def test_the_published_hook_keeps_its_traps() -> None:
    """One token alone never fires; padding moves z (docs/method.md section 3, traps 1 and 2)."""
    base = torch.nn.Linear(6, 4)
    hook = importlib.import_module("baselines.published_coachhook_flow").PublishedHook(base)
    hook.delta[:] = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    hook.alpha.fill_(1.5)
    x = torch.full((1, 7, 6), 0.1)
    x[0, 3] = 5.0
    with torch.no_grad():
        changed = (hook(x) != base(x)).any(-1)
        assert changed.tolist() == [[False, False, False, True, False, False, False]]
        assert torch.equal(hook(x[:, 3:4]), base(x[:, 3:4]))
        reached = float(hook.largest_z) if hook(x).numel() else 0.0
        padded = torch.cat([x, torch.zeros(1, 8, 6)], dim=1)
        hook(padded)
        assert abs(float(hook.largest_z) - reached) > 0.1
