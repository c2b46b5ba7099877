"""The command line, from a model folder to a rolled-back edit set: results on stdout, `--json`, files."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import QUICK, edits, facts, fails, model, out, run_json, run_text
from tiny import tiny_facts, tiny_texts

from coachhook_fast.cli import VERBS, main
from coachhook_fast.cli.common import _layers, load_config
from coachhook_fast.config import PAPER, ROUND_ROBIN_SETTINGS, EditConfig
from coachhook_fast.edits.manifest import MANIFEST

# -------------------------------------------------------------------- help


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from coachhook_fast.cli import build_parser; build_parser().format_help();"
        "sys.exit(bool({'torch', 'transformers', 'rich', 'yaml'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", [verb.NAME for verb in VERBS])
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"coachhook {verb}" in text
    assert "--json" in text


def test_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coachhook_fast.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "coachhook VERB --help" in done.stdout


# -------------------------------------------------------------------- the verbs


def test_stats(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = home / "corpus.txt"
    corpus.write_text("\n\n".join(tiny_texts()))
    arguments = ["stats", *model(home), "--corpus", str(corpus), "--max-tokens", "800", "--layers", "1-2"]
    data = run_json(capsys, *arguments)
    assert [line["layer"] for line in data["layers"]] == [1, 2]
    assert data["layers"][0]["key_dim"] == 45
    assert "mean_square_norm" in data["layers"][0]
    assert "keys of model" in run_text(capsys, *arguments)


def test_edit_goes_on_where_it_stopped(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["edit", *model(home), *facts(home), *edits(home), "--batch-size", "2", *out(home, "longer")]
    data = run_json(capsys, *arguments)
    assert data["already_edited"] == 4
    assert [batch["edits"] for batch in data["batches"]] == [2]
    assert data["layers"] == [1, 2]  # the saved set's settings hold
    assert data["config"]["v_num_grad_steps"] == 3
    assert {"loss", "steps", "leverage", "residual_left", "case_id", "subject"} <= set(data["edits"][0])
    assert len(run_json(capsys, "log", "--edits", str(home / "longer"))["batches"]) == 3
    again = ["edit", *model(home), *facts(home), "--edits", str(home / "longer")]
    assert run_json(capsys, *again)["seconds_per_edit"] is None
    assert "0 edits in 0 batches" in run_text(capsys, *again)


def test_edit_with_the_sequence_gate_and_a_yaml_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "hparams.yaml").write_text("alg_name: MEMIT\nlayers: [1]\nv_num_grad_steps: 2\nmom2_n_tokens: 600\n")
    arguments = ["--config", str(home / "hparams.yaml"), "--gate", "sequence", "--set", "v_lr=1e-1", "--limit", "2"]
    text = run_text(capsys, "edit", *model(home), *facts(home), *arguments, *out(home, "sequence"))
    assert "2 edits in 1 batches" in text
    config = run_json(capsys, "log", "--edits", str(home / "sequence"))["config"]
    assert (config["gate"], config["layers"], config["v_lr"]) == ("sequence", [1], 0.1)


def test_a_setting_by_its_former_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*QUICK, "--set", "layer_turns=2", "--set", "threshold_rule=own_keys", "--limit", "1"]
    assert main(["edit", *model(home), *facts(home), *arguments, *out(home, "former")]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "former" in line and "warning" in line]
    assert len(warned) == 1
    assert "layer_turns is round_robin now, threshold_rule 'own_keys' is 'edit_keys' now" in warned[0]
    config = run_json(capsys, "log", "--edits", str(home / "former"))["config"]
    assert (config["round_robin"], config["threshold_rule"]) == (2, "edit_keys")


def test_eval(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "held-out.txt").write_text("The pilot of Lund met the baker of Oslo. " * 20)
    files = ["--csv", str(home / "made" / "scores.csv"), "--markdown", str(home / "scores.md")]
    arguments = ["eval", *model(home), *edits(home), *facts(home), "--limit", "4"]
    text = ["--perplexity", str(home / "held-out.txt"), "--window", "32"]
    data = run_json(capsys, *arguments, *files, *text, "--details")
    assert {"reliability", "generality", "locality", "generation", "perplexity_ratio"} <= set(data)
    assert len(data["records"]) == 4
    assert (home / "made" / "scores.csv").read_text().count("\n") == 5
    assert "| reliability |" in (home / "scores.md").read_text()
    # The second run reads the base's answers from the cache.
    (kept,) = (home / "cache" / "base-answers").glob("*.json")
    before = kept.stat().st_mtime_ns, kept.read_text()
    assert run_json(capsys, *arguments, *text)["locality"] == data["locality"]
    assert kept.read_text() == before[1]
    kept.write_text("{}")  # a damaged one is made anew
    assert run_json(capsys, *arguments, *text)["locality"] == data["locality"]
    assert kept.read_text() == before[1]
    shown = run_text(capsys, *arguments, "--details", "--ungated", "--metrics", "accuracy,fluency")
    assert "reliability" in shown
    assert "fluency" in shown
    assert "efficacy" not in shown


def test_eval_of_the_base_model_is_local(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "eval", *model(home), *facts(home), "--base", str(home / "base.json"))
    assert data["locality"] == 1.0
    assert (home / "base.json").is_file()


@pytest.mark.slow
def test_eval_of_the_edited_subject(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (home / "facts.jsonl").read_text().splitlines()[:2]]
    for number, line in enumerate(lines):
        line |= {"rephrase_prompt": line.pop("rephrase_prompts"), "relation": "P106", "case_id": number}
        line["same_subject"] = [{"prompt": f"{line['subject']} met", "answer": "a clerk"}]
    kinds = [{"case_id": number, "rephrase_kind": "other", "paraphrases": [f"At work {number}"]} for number in range(2)]
    for name, objects in (("subject.jsonl", lines), ("kinds.jsonl", kinds)):
        (home / name).write_text("\n".join(map(json.dumps, objects)))
    arguments = ["eval", *model(home), *edits(home), "--facts", str(home / "subject.jsonl"), "--metrics", "all"]
    split = ["--kinds", str(home / "kinds.jsonl"), "--passing", "2"]
    data = run_json(capsys, *arguments, *split)
    names = {"fact_score", "paraphrase", "same_subject", "leak", "leak_passing", "repeats", "said", "said_question"}
    assert all(data[name] is not None for name in names)
    assert list(data["kinds"]) == ["generality/other"]
    (kept,) = (
        path
        for path in (home / "cache" / "base-answers").glob("*.json")
        if len(json.loads(path.read_text())["written"])
    )
    assert run_json(capsys, *arguments, *split) == {**data, "seconds": pytest.approx(0, abs=60)}
    assert "generality/other" in run_text(capsys, *arguments, *split, "--details")
    assert run_json(capsys, *arguments)["paraphrase"] is None  # nobody says what the rephrase prompts ask
    kept.write_text(json.dumps({"version": 1, "model": "m", "records": "r", "neighbours": []}))
    assert "version 1, this package reads 2" in fails(capsys, *arguments, *split, "--base", str(kept))
    assert "passing must be in 1..20" in fails(capsys, *arguments, "--passing", "21")


def test_eval_passes_tasks_to_lm_eval(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coachhook_fast.evaluate import harness

    arguments = ["eval", *model(home), *facts(home), "--limit", "1", "--metrics", "accuracy", "--tasks", "a,b"]
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'coachhook-fast[lm-eval]'" in fails(capsys, *arguments)  # before any work
    monkeypatch.setattr(harness, "check_installed", lambda: None)
    monkeypatch.setattr(harness, "run_tasks", lambda model, tokenizer, tasks: {task: {"acc": 0.5} for task in tasks})
    assert run_json(capsys, *arguments)["tasks"] == {"a": {"acc": 0.5}, "b": {"acc": 0.5}}
    assert "acc" in run_text(capsys, *arguments)


def test_generate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Ada Vale works as a", "The old market"]
    data = run_json(capsys, "generate", *model(home), *edits(home), "--compare", "--max-new-tokens", "4", *prompts)
    assert [line["prompt"] for line in data] == prompts
    plain = run_json(capsys, "generate", *model(home), "--max-new-tokens", "4", *prompts)
    assert [line["completion"] for line in plain] == [line["base_completion"] for line in data]
    assert "Ada Vale works as a" in run_text(capsys, "generate", *model(home), *prompts)


def test_inspect(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = tiny_facts(1)[0]["subject"]
    files = ["--html", str(home / "view.html")]
    data = run_json(capsys, "inspect", *model(home), *edits(home), f"{subject} works as a", *files)
    assert data["layers"] == [1, 2]
    assert {"token", "id", "norm", "z", "fire"} == set(data["tokens"][0])
    assert "<table>" in (home / "view.html").read_text()
    assert "layer 2" in run_text(capsys, "inspect", *model(home), *edits(home), "Ada Vale")


def test_log_and_rollback(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "log", *edits(home))
    first, second = (batch["id"] for batch in data["batches"])
    assert data["batches"][0]["edits"][0]["subject"] == tiny_facts(1)[0]["subject"]
    text = run_text(capsys, "log", *edits(home))
    assert first in text
    assert "4 edits of model" in text
    assert tiny_facts(1)[0]["target_new"] in run_text(capsys, "log", *edits(home), "--facts")

    arguments = ["rollback", *model(home), *edits(home), *out(home, "less"), first]
    assert run_json(capsys, *arguments) == {
        "removed": first,
        "removed_edits": 2,
        "requests": [0, 1],
        "batches": [second],
        "out": str(home / "less"),
    }
    assert [batch["id"] for batch in run_json(capsys, "log", "--edits", str(home / "less"))["batches"]] == [second]
    assert len(run_json(capsys, "log", *edits(home))["batches"]) == 2
    assert "removed batch" in run_text(capsys, "rollback", *model(home), "--edits", str(home / "less"), second)


def test_rollback_of_one_request(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (batch["id"] for batch in run_json(capsys, "log", *edits(home))["batches"])
    fact = tiny_facts(6)[1]
    arguments = ["rollback", *model(home), *edits(home), *out(home, "one-less"), second, "--request", "0"]
    data = run_json(capsys, *arguments)
    assert (data["removed"], data["removed_edits"], data["requests"]) == (second, 1, [0])
    assert data["batches"] == [first, second]
    less = ["--edits", str(home / "one-less")]
    shown = run_text(capsys, "rollback", *model(home), *less, first, "--request", "1")
    subject, target = fact["subject"], fact["target_new"]
    assert f"removed '{fact['prompt'].format(subject)}' -> '{target}' from batch {first}; 2 batches are left" in shown
    data = run_json(capsys, "log", *less)
    assert [[edit["request"] for edit in batch["edits"]] for batch in data["batches"]] == [[0], [1]]
    found = [(one["batch"], one["index"], one["reason"]) for one in data["removed"]]
    assert found == [(second, 0, "removed"), (first, 1, "removed")]
    assert "2 edits of model" in run_text(capsys, "log", *less)
    text = run_text(capsys, "log", *less, "--facts")
    assert text.count(subject) == 1  # among the removed ones
    assert run_json(capsys, "verify-edits", str(home / "one-less"))["edits"] == 2
    again = ["rollback", *model(home), *less, first, "--request"]
    assert f"request 1 of batch '{first}' is not there any more: removed at" in fails(capsys, *again, "1")
    assert f"batch '{first}' has no request 7: it has [0]" in fails(capsys, *again, "7")
    for wrong in ("-1", "x", "1.5", "", "9" * 99):
        assert "must be a number from 0 on" in fails(capsys, *again[:-1], f"--request={wrong}")
    assert run_json(capsys, *again, "0")["batches"] == [second]
    assert main(["rollback", *model(home), *less, second, "--request", "1"]) == 0
    assert run_json(capsys, "check", *model(home), *less) == {"facts": [], "said": 0, "not_said": 0}


def test_check(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model says no word of the facts; one token behind the subject it does."""
    data = run_json(capsys, "check", *model(home), *edits(home), code=1)
    assert (data["said"], data["not_said"]) == (0, 4)
    assert [fact["request"] for fact in data["facts"]] == [0, 1, 0, 1]
    asked = data["facts"][0]["questions"][0]
    assert asked["text"] == f"{tiny_facts(1)[0]['subject']} works as a"
    assert not asked["said"]
    assert asked["answer"]
    text = run_text(capsys, "check", *model(home), *edits(home), code=1)
    assert "0 of 4 facts are said" in text
    path = home / "said.jsonl"
    path.write_text(json.dumps({"prompt": "The home of {}", "subject": "Ada Vale", "target_new": "w"}))
    strong = ["--set", "v_num_grad_steps=60", "--set", "mom2_n_tokens=600", "--set", "mom2_update_weight=0.01"]
    strong += ["--set", "threshold_rule=fpr", "--set", "threshold_fpr=0.99", "--set", "context_seeds=[]"]
    strong += ["--set", "subject_templates=[]", "--set", "v_lr=0.3", "--layers", "1,2"]
    assert main(["edit", *model(home), "--facts", str(path), *strong, *out(home, "said")]) == 0
    said = run_json(capsys, "check", *model(home), "--edits", str(home / "said"))
    assert (said["said"], said["not_said"]) == (1, 0)
    assert "1 of 1 facts are said" in run_text(capsys, "check", *model(home), "--edits", str(home / "said"))
    assert "holds no edit set" in fails(capsys, "check", *model(home), "--edits", str(home))


def test_a_copy_with_nothing_to_edit_is_still_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["edit", *model(home), *facts(home), "--limit", "4", *edits(home), *out(home, "copy")]
    assert run_json(capsys, *arguments)["edits"] == []
    assert len(run_json(capsys, "log", "--edits", str(home / "copy"))["batches"]) == 2


def test_a_config_file_changes_only_what_it_names(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "few.yaml"
    path.write_text("v_num_grad_steps: 2\n")
    held = run_json(capsys, "log", *edits(home))["config"]
    arguments = ["edit", *model(home), *facts(home), *edits(home), "--config", str(path), *out(home, "fewer-steps")]
    found = run_json(capsys, *arguments)["config"]
    assert found == held | {"v_num_grad_steps": 2}


def test_a_prompt_that_a_file_changes_twice_keeps_its_last_answer(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ({**tiny_facts(1)[0], "target_new": word} for word in ("pilot", "baker"))
    path = home / "twice.jsonl"
    path.write_text("\n".join(map(json.dumps, [first, second])))
    arguments = ["edit", *model(home), "--facts", str(path), *QUICK, "--batch-size", "1", *out(home, "twice")]
    assert [line["target_new"] for line in run_json(capsys, *arguments)["edits"]] == ["pilot", "baker"]
    again = ["edit", *model(home), "--facts", str(path), "--edits", str(home / "twice")]
    assert run_json(capsys, *again)["edits"] == []


def test_a_prompt_that_changes_twice_goes_on_after_an_interrupt(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed after the first batch: what is left is the second change, not both."""
    first, other = tiny_facts(2)
    path = home / "changes.jsonl"
    records = [{**first, "target_new": "pilot"}, other, {**first, "target_new": "baker"}]
    path.write_text("\n".join(map(json.dumps, records)))
    arguments = ["edit", *model(home), "--facts", str(path), *QUICK, "--batch-size", "2"]
    run_json(capsys, *arguments, "--limit", "2", *out(home, "interrupted"))
    data = run_json(capsys, "edit", *model(home), "--facts", str(path), "--edits", str(home / "interrupted"))
    assert [line["target_new"] for line in data["edits"]] == ["baker"]


def test_settings_and_layers() -> None:
    pairs = ["v_num_grad_steps=3", "v_lr=1e-3", "kl_factor=0.5", "threshold_rule=fpr", "context_seeds=[a, b]"]
    arguments = argparse.Namespace(config=None, layers=None, gate=None, set=pairs)
    assert load_config(arguments) == EditConfig(
        v_num_grad_steps=3, v_lr=1e-3, kl_factor=0.5, threshold_rule="fpr", context_seeds=("a", "b")
    )
    assert _layers("4,5, 6") == (4, 5, 6)
    assert _layers("1-3,7") == (1, 2, 3, 7)


# -------------------------------------------------------------------- bench


def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import coachhook_fast.bench

    row = {
        "work": "solve",
        "baseline": "lu",
        "seconds": 0.5,
        "baseline_seconds": 2.0,
        "ratio": 4.0,
        "floor_ratio": 1.5,
        "checked": True,
        "device": "cpu",
        "dtype": "float64",
        "shape": [6400, 10],
    }
    monkeypatch.setattr(coachhook_fast.bench, "BENCHMARKS", {"solve": lambda: [row]}, raising=False)
    assert run_json(capsys, "bench", "solve") == [row]
    assert run_json(capsys, "bench", "--list") == ["solve"]
    assert "lu" in run_text(capsys, "bench", "solve")
    assert "NAME must be one of solve" in fails(capsys, "bench")


def test_bench_of_ones_own_model(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import coachhook_fast.bench.gated_linear as benchmark

    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    model, edits = str(home / "model"), str(home / "edits")
    rows = run_json(capsys, "bench", "gated-linear", "--model", model, "--edits", edits)
    assert {row["tokens"] for row in rows} == {1, 8, 64, 256}
    assert all(row["checked"] and 0 < row["added_bytes"] < row["twin_bytes"] for row in rows)
    assert "give both model and edits" in fails(capsys, "bench", "gated-linear", "--model", model)
    assert "takes no model" in fails(capsys, "bench", "solve", "--model", model)


def test_edit_goes_on_from_a_set_of_an_earlier_version(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round-robin batches from before thresholds could be relative go on as they were."""
    paper = [
        "--set",
        "round_robin=2",
        *(f for n in ROUND_ROBIN_SETTINGS[1:] for f in ("--set", f"{n}={json.dumps(PAPER[n])}")),
    ]
    folder = str(tmp_path / "old")
    run_text(capsys, "edit", *model(home), *facts(home), *QUICK, *paper, "--limit", "2", "--out", folder)
    manifest = json.loads((tmp_path / "old" / MANIFEST).read_text())
    for name in ROUND_ROBIN_SETTINGS[1:]:
        del manifest["config"][name]
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(manifest))
    longer = str(tmp_path / "longer")
    run_text(capsys, "edit", *model(home), *facts(home), "--edits", folder, "--limit", "4", "--out", longer)
    config = json.loads((tmp_path / "longer" / MANIFEST).read_text())["config"]
    assert [config[name] for name in ROUND_ROBIN_SETTINGS] == [2, *(PAPER[name] for name in ROUND_ROBIN_SETTINGS[1:])]
