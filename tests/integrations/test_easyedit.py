"""EasyEdit's calling convention, with hparams files and data of its forms, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import logits
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast.evaluate.scoring import encode_pair, score_pairs
from coachhook_fast.integrations.easyedit import BaseEditor, CoachHooKHyperParams, MEMITHyperParams

# An hparams file as EasyEdit's are, and below it settings of ours.
HPARAMS = """
alg_name: "MEMIT"
model_name: "{model}"
stats_dir: "./data/stats"
device: {device}
layers: [1, 2]
clamp_norm_factor: 4
layer_selection: "all"
fact_token: "subject_last"
v_num_grad_steps: 8
v_lr: 5e-1
v_loss_layer: 3
v_weight_decay: 1e-3
kl_factor: 0.0625
mom2_adjustment: true
mom2_update_weight: 5
rewrite_module_tmp: "model.layers.{{}}.mlp.down_proj"
layer_module_tmp: "model.layers.{{}}"
mlp_module_tmp: "model.layers.{{}}.mlp"
attn_module_tmp: "model.layers.{{}}.self_attn"
ln_f_module: "model.norm"
lm_head_module: "lm_head"
mom2_dataset: "wikipedia"
mom2_n_samples: 100000
mom2_dtype: "float32"
model_parallel: false
batch_size: 2

context_tokens: 3
threshold_keys: 64
stats_sequence_length: 48
threshold_rule: zscore
threshold_z: 2.0
"""


@pytest.fixture
def hparams(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(HPARAMS.format(model=tmp_path / "model", device="cpu"))
    return tmp_path / "tiny.yaml"


def editor(hparams: Path) -> BaseEditor:
    return BaseEditor.from_hparams(MEMITHyperParams.from_hparams(hparams), corpus=tiny_texts(12))


def data(count: int) -> dict[str, Any]:
    facts = tiny_facts(count)
    return {
        "prompts": [fact["prompt"].replace("{}", fact["subject"]) for fact in facts],
        "subject": [fact["subject"] for fact in facts],
        "target_new": [fact["target_new"] for fact in facts],
        "ground_truth": ["nobody"] * count,
        "rephrase_prompts": [f"Everyone knows that {fact['subject']} is a" for fact in facts],
        "locality_inputs": {
            "neighborhood": {"prompt": ["The river is"] * count, "ground_truth": ["blue"] * count},
            "distracting": {"prompt": [["One is", "Two is"]] * count, "ground_truth": [["a", "the"]] * count},
        },
        "portability_inputs": {
            "one_hop": {
                "prompt": ["They work at", *[None] * (count - 1)],
                "ground_truth": ["home", *[None] * (count - 1)],
            }
        },
        "verbose": False,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_metrics_have_easyedits_form_and_are_token_accuracies(hparams: Path) -> None:
    found = editor(hparams)
    given = data(2)
    metrics, model, undo = found.edit(**given, sequential_edit=True)
    assert model is found.model
    assert [line["case_id"] for line in metrics] == [0, 1]
    for index, line in enumerate(metrics):
        assert set(line) == {"pre", "post", "case_id", "requested_rewrite", "time"}
        assert line["requested_rewrite"]["subject"] == given["subject"][index]
        assert set(line["post"]) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}
        assert set(line["pre"]) == {"rewrite_acc", "rephrase_acc", "portability"}
        assert set(line["post"]["locality"]) == {"neighborhood_acc", "distracting_acc"}
        assert len(line["post"]["locality"]["distracting_acc"]) == 2
        assert ("one_hop_acc" in line["post"]["portability"]) == (index == 0)
        pair = encode_pair(tiny_tokenizer(), given["prompts"][index], given["target_new"][index])
        for side, of in (("pre", tiny_model("llama")), ("post", model)):
            assert line[side]["rewrite_acc"] == [score_pairs(of, [pair])[0].agreement(pair.target)]
    assert found.editor.edit_set.num_edits == 2
    undo()
    assert found.editor.edit_set.num_edits == 0
    assert torch.equal(logits(found.model), logits(tiny_model("llama")))


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_edits_that_are_not_sequential_are_measured_alone_and_undone(hparams: Path) -> None:
    found = editor(hparams)
    alone, _, _ = found.edit(**data(2))
    assert found.editor.edit_set.num_edits == 0
    assert torch.equal(logits(found.model), logits(tiny_model("llama")))
    one = {name: value[1:] if isinstance(value, list) else value for name, value in data(2).items()}
    del one["locality_inputs"], one["portability_inputs"]
    again, _, _ = editor(hparams).edit(**one)
    assert alone[1]["post"]["rewrite_acc"] == again[0]["post"]["rewrite_acc"]


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_what_was_edited_before_is_there_again_where_a_call_took_its_place(hparams: Path) -> None:
    found = editor(hparams)
    fact = {name: value for name, value in data(1).items() if name in ("prompts", "subject", "target_new")}
    found.edit(**fact, sequential_edit=True)
    first, before = found.editor.edit_set, logits(found.model)
    other = {**fact, "target_new": ["cook"]}
    found.edit(**other)
    assert found.editor.edit_set is first  # nothing in the ledger, of what was removed neither
    assert torch.equal(logits(found.model), before)
    twice = {name: value * 2 for name, value in other.items()}
    _, _, undo = found.edit(**{**twice, "target_new": ["cook", "sailor"]}, sequential_edit=True)
    assert [request.target_new for request in found.editor.edit_set.requests] == ["sailor"]
    undo()
    assert found.editor.edit_set is first
    assert torch.equal(logits(found.model), before)


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_rephrase_prompts_are_learned_from_only_where_asked(hparams: Path) -> None:
    found = editor(hparams)
    found.edit(**data(1), sequential_edit=True)
    assert found.editor.edit_set.requests[0].paraphrases == ()
    other = editor(hparams)
    other.edit(**data(1), sequential_edit=True, train_rephrase=True)
    assert other.editor.edit_set.requests[0].paraphrases == tuple(data(1)["rephrase_prompts"])


@pytest.mark.filterwarnings("ignore::coachhook_fast.EditWarning")
def test_batches_have_the_files_size(hparams: Path) -> None:
    found = editor(hparams)
    metrics, _, _ = found.batch_edit(**data(3), sequential_edit=True)
    assert [len(batch.requests) for batch in found.editor.ledger] == [2, 1]
    assert len(metrics) == 3
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        found.edit(**data(3), batch_size=0)


def test_hparams_files_are_read_as_they_are(hparams: Path) -> None:
    found = MEMITHyperParams.from_hparams(hparams.with_suffix(""))
    assert found.config.layers == (1, 2)
    assert found.config.v_lr == 0.5
    assert found.config.v_weight_decay == 1e-3
    assert found.batch_size == 2
    assert found.placement == "cpu"
    hparams.write_text(HPARAMS.format(model="", device=0).replace('model_name: ""', ""))
    with pytest.raises(ValueError, match="must name the model as model_name, got None"):
        MEMITHyperParams.from_hparams(hparams)
    with pytest.raises(FileNotFoundError):
        MEMITHyperParams.from_hparams(hparams.with_name("nothing"))


def test_a_pair_of_model_and_tokenizer_is_a_model_name(hparams: Path) -> None:
    config = MEMITHyperParams.from_hparams(hparams).config
    model = tiny_model("llama")
    found = BaseEditor(CoachHooKHyperParams((model, tiny_tokenizer()), config))
    assert found.model is model
    for name in (3, None, (model,), (model, None), ("a", "b"), ""):
        with pytest.raises(TypeError, match="model_name must be a hub name, a folder or the pair"):
            CoachHooKHyperParams(name, config)
    with pytest.raises(ValueError, match="a GPU's number in device must be 0 or above, got -1"):
        CoachHooKHyperParams((model, tiny_tokenizer()), config, device=-1)
    with pytest.raises(TypeError, match="hparams must be a CoachHooKHyperParams"):
        BaseEditor.from_hparams({"model_name": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"subject": None}, ValueError, "subject is missing"),
        ({"subject": ["Nobody", "Nobody"]}, ValueError, "subject"),
        ({"target_new": ["a"]}, ValueError, "target_new must hold one text a prompt, 2, got 1"),
        ({"target_new": [1, 2]}, TypeError, "target_new must be a text or a list of texts"),
        ({"prompts": []}, ValueError, "prompts must hold a fact or more"),
        ({"rephrase_prompts": ["x"]}, ValueError, "rephrase_prompts must hold one entry a prompt"),
        ({"locality_inputs": {"a": {"prompt": ["x", "y"]}}}, ValueError, r"locality_inputs\['a'\] must hold"),
        ({"locality_inputs": {"a": {"prompt": ["x", "y"], "ground_truth": ["x", None]}}}, ValueError, "for fact 1"),
        ({"locality_inputs": ["x"]}, TypeError, "locality_inputs must be a mapping"),
        ({"portability_inputs": {"a": {"prompt": [["x"]], "ground_truth": [["x"]]}}}, ValueError, "one entry a prompt"),
        ({"test_generation": True}, ValueError, "test_generation is not measured"),
        ({"eval_metric": "ppl"}, ValueError, "eval_metric must be one of"),
        ({"speed": 3}, TypeError, r"\['speed'\]"),
        ({"rephrase_prompts": ["x", ""]}, ValueError, "rephrase_prompts must have a token at least"),
        ({"rephrase_prompts": ["x", "x " * 400]}, ValueError, "rephrase_prompts must .* context, 256"),
        (
            {"locality_inputs": {"a": {"prompt": ["x", ""], "ground_truth": ["x", "x"]}}},
            ValueError,
            r"inputs\['a'\]\['p",
        ),
        ({"sequential_edit": "no"}, TypeError, "sequential_edit must be true or false, got 'no'"),
        (
            {"prompts": [data(2)["prompts"][0], data(2)["prompts"][1] + " w" * 400]},
            ValueError,
            "prompts must .* context, 256",
        ),
        (
            {"prompts": [data(2)["prompts"][0], "w " * 235 + data(2)["prompts"][1]]},
            ValueError,
            "batch 2: .*context is 256",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_is_edited(
    hparams: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    found = editor(hparams)
    with pytest.raises(error, match=message):
        found.edit(**{**data(2), **changes})
    assert found.editor.statistics is None
    assert found.editor.edit_set.num_edits == 0
