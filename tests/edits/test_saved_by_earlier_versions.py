"""Edit sets that released versions saved (tests/fixtures/edit_sets/VERSION, `make fixtures`): loaded, served, gone on
from as they were then.

`expected.safetensors` holds what that version gave: token ids, logits of the last token after the last batch and after
the first, each layer's Δ. The base model lies beside it, for random numbers may differ elsewhere.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import edit, facts
from safetensors.torch import load_file
from tiny import tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, load_edits
from coachhook_fast.edits import store

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "edit_sets"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
FOLDER = FIXTURES / "0.1.0"  # the one with settings by former names
SETS = ("round_robin", "sequence", "two_batches")
FORMER = {
    "layer_turns": "round_robin", "others_weight": "other_layers_weight", "namesakes": "hard_negatives",
    "namesake_tokens": "hard_negative_tokens", "openings": "short_prefixes", "threshold_own": "threshold_edit_share",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:settings by former names:FutureWarning")


every_version = pytest.mark.parametrize("version", VERSIONS)


def base(version: str) -> Any:
    model = tiny_model("llama")
    model.load_state_dict(load_file(FIXTURES / version / "model.safetensors"))
    return model


@functools.cache
def expected(version: str, kind: str) -> list[torch.Tensor]:
    values = load_file(FIXTURES / version / "expected.safetensors")
    return [values[f"{kind}.{n}"] for n in range(sum(name.startswith(f"{kind}.") for name in values))]


@torch.no_grad()
def last_logits(version: str, model: Any) -> list[torch.Tensor]:
    return [model(ids[None]).logits[0, -1] for ids in expected(version, "ids")]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@every_version
@pytest.mark.parametrize("name", SETS)
def test_it_serves_what_it_served(version: str, name: str) -> None:
    wanted = expected(version, f"{name}.logits")
    clean = last_logits(version, base(version))
    assert max(float((one - other).abs().max()) for one, other in zip(clean, wanted, strict=True)) > 0.1
    assert_close(last_logits(version, load_edits(base(version), FIXTURES / version / name)), wanted)


@every_version
@pytest.mark.parametrize("name", SETS)
def test_it_reads_what_was_written(version: str, name: str) -> None:
    edits = store.load(FIXTURES / version / name)
    for delta, wanted in zip(edits.deltas, expected(version, f"{name}.delta"), strict=True):
        assert torch.equal(delta.dense(), wanted)
    assert [len(batch.outcomes) for batch in edits.batches] == ([2] if name == "sequence" else [2, 3])


@every_version
@pytest.mark.parametrize("name", SETS)
def test_editing_goes_on(version: str, name: str, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / version / name, tmp_path / name)
    editor = Editor(base(version), tiny_tokenizer(), edits=tmp_path / name)
    editor.collect_statistics(tiny_texts(12), progress=False)
    assert_close(last_logits(version, editor.model), expected(version, f"{name}.logits"))
    edit(editor, facts(2, seed=7))
    editor.save_pretrained(tmp_path / name)
    editor.rollback(editor.ledger[-1].id)
    assert_close(last_logits(version, editor.model), expected(version, f"{name}.logits"))
    assert len(store.load(tmp_path / name).batches) == len(editor.ledger) + 1


@every_version
@pytest.mark.parametrize("name", ["round_robin", "two_batches"])
def test_a_batch_is_rolled_back(version: str, name: str) -> None:
    editor = Editor(base(version), tiny_tokenizer(), edits=FIXTURES / version / name)
    editor.collect_statistics(tiny_texts(12), progress=False)
    editor.rollback(editor.ledger[-1].id)
    assert_close(last_logits(version, editor.model), expected(version, f"{name}.first_batch"))


@pytest.mark.parametrize("name", SETS)
def test_settings_by_their_former_names(name: str) -> None:
    """Read in one piece with one warning, which names every new name."""
    saved = json.loads((FOLDER / name / "edit_set.json").read_text())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edits = store.load(FOLDER / name)
    assert [warning.category for warning in caught] == [FutureWarning]
    for old, new in FORMER.items():
        assert getattr(edits.config, new) == saved["config"][old]
        assert f"{old} is {new} now" in str(caught[0].message)
    renamed = saved["config"]["threshold_rule"] == "own_keys"
    assert edits.config.threshold_rule == ("edit_keys" if renamed else saved["config"]["threshold_rule"])
    assert ("'own_keys' is 'edit_keys' now" in str(caught[0].message)) == renamed
    for batch, line in zip(edits.batches, saved["batches"], strict=True):
        assert [list(outcome.leverage) for outcome in batch.outcomes] == [o["strength"] for o in line["outcomes"]]


def test_new_names_warn_of_nothing(tmp_path: Path) -> None:
    store.save(store.load(FOLDER / "round_robin"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = store.load(tmp_path)
    assert again.config == store.load(FOLDER / "round_robin").config
    assert "layer_turns" not in (tmp_path / "edit_set.json").read_text()


def test_former_names_in_a_file_and_in_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("layers: [1, 2]\nlayer_turns: 2\nthreshold_rule: own_keys\n")
    with pytest.warns(FutureWarning, match="layer_turns is round_robin now") as caught:
        config = EditConfig.from_yaml(tmp_path / "settings.yaml")
    assert len(caught) == 1
    assert config == EditConfig(layers=(1, 2), round_robin=2, threshold_rule="edit_keys")
    with pytest.warns(FutureWarning, match="openings is short_prefixes now"):
        assert EditConfig.from_dict({"openings": 0.1}) == EditConfig(short_prefixes=0.1)
    with pytest.raises(ValueError, match="two names, take the second: namesakes and hard_negatives"):
        EditConfig.from_dict({"namesakes": 1, "hard_negatives": 2})
