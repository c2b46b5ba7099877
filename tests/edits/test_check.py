"""What no editor writes is refused when an edit set is loaded, and verify-edits says the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_cases import change, edit_set, tensors_of, with_tensors
from tiny import tiny_model

from coachhook_fast import load_edits
from coachhook_fast.cli import main
from coachhook_fast.edits import store
from coachhook_fast.edits.check import disagreement, orthonormality
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.removal import without
from coachhook_fast.edits.threshold import Threshold

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "edit_sets" / "0.1.0"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    store.save(edit_set(3), tmp_path / "edits")
    return tmp_path / "edits"


def refused(folder: Path, message: str) -> None:
    """By load and by verify-edits, in one line that names the folder."""
    with pytest.raises(ValueError, match=message) as caught:
        store.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main(["verify-edits", str(folder)]) == 2


def changed(values: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("weights", "0.U"), ("weights", "1.B"), ("batch", "0.keys"), ("batch", "1.residuals"), ("batch", "0.directions")],
)
def test_values_that_are_not_finite_or_huge(saved: Path, kind: str, name: str, value: float) -> None:
    tensors = tensors_of(saved, kind)
    with_tensors(saved, kind, {**tensors, name: changed(tensors[name], (1, 1), value)})
    refused(saved, f"{name} must be finite")


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {**tensors, name: tensors[name] * factor}


def cut(name: str, rows: int | None = None, columns: int | None = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {**tensors, name: tensors[name][:rows, :columns].contiguous()}


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("weights", scaled("0.U", 1.01), "0.U is not orthonormal"),
        ("weights", scaled("0.U", 0.0), "0.U is not orthonormal"),
        ("weights", scaled("0.B", 1.1), "do not add up to the weights of layer 1"),
        ("weights", lambda t: {**t, "1.U": torch.eye(24, 6), "1.B": t["1.B"]}, "add up to the weights of layer 2"),
        ("weights", lambda t: {**t, "1.U": torch.zeros(24, 0), "1.B": torch.zeros(0, 45)}, "do not add up"),
        ("weights", lambda t: {**t, "0.U": torch.zeros(24, 90_000), "0.B": torch.zeros(90_000, 45)}, "rank 90000"),
        ("weights", lambda t: {**t, "0.U": torch.eye(24, 7), "0.B": torch.zeros(7, 45)}, "have 6 columns"),
        ("weights", lambda t: {**t, "0.U": torch.eye(24, 5)}, "U must be"),
        ("weights", cut("0.B", columns=40), r"directions must be \[40, 2\]|keys must be \[40"),
        ("weights", lambda t: {**t, "0.W": torch.zeros(6, 6)}, "W must be finite"),
        ("weights", lambda t: {**t, "0.U": t["0.U"].double()}, "share dtype"),
        ("batch", cut("0.keys", columns=1), "1 columns for 2 residuals"),
        ("batch", cut("0.keys", rows=40), "keys must be"),
        ("batch", cut("0.residuals", rows=20), "residuals must be"),
        ("batch", cut("0.directions", columns=1), "directions must be"),
        ("batch", scaled("1.residuals", 0.0), "do not add up"),
        ("batch", scaled("1.directions", -1.0), "do not add up"),
    ],
)
def test_tensors_that_do_not_fit(saved: Path, kind: str, edit: Any, message: str) -> None:
    with_tensors(saved, kind, edit(tensors_of(saved, kind)))
    refused(saved, message)


def threshold(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["thresholds"].__setitem__(0, value)


def batch(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["batches"][number].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *[(threshold([value, None, None]), "threshold must be positive") for value in (-1.0, 0, -0.0, 1e-320, 1e300)],
        *[(threshold([1.0, 0.5, value]), "std must be positive") for value in (0, -1.0, 1e-320)],
        (batch(1, thresholds=[[0, None, None], [1, None, None]]), "threshold must be positive"),
        (lambda m: m["batches"].append({**m["batches"][0], "parent": m["batches"][-1]["id"]}), "is there twice"),
        (batch(0, id=""), "is broken"),
        (lambda m: m["config"].update(layers=[1, 10_000_000]), "layers must be under"),
        (lambda m: m["config"].update(context_tokens=1_000_000), "context_tokens must be at most"),
        (lambda m: m["config"].update(rewrite_module_tmp="{}.{x}"), "rewrite_module_tmp must be"),
        (lambda m: m["config"].update(rewrite_module_tmp="{0.__class__}"), "rewrite_module_tmp must be"),
        (lambda m: m["batches"][0]["outcomes"][0]["request"].update(case_id={"a": 1}), "case_id must be"),
        (lambda m: m["weights"].update(file="weights.safetensors"), "a tensor file is called"),
        (lambda m: m["weights"].update(sha256="0"), "has sha256"),
    ],
)
def test_ledgers_that_no_editor_writes(saved: Path, edit: Any, message: str) -> None:
    change(saved, edit)
    refused(saved, message)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_has_not(saved: Path, text: str) -> None:
    path = saved / "edit_set.json"
    path.write_text(path.read_text().replace('"seconds": 1.5', f'"seconds": {text}', 1))
    refused(saved, "NaN|Infinity|inf")


def test_a_key_that_is_there_twice(saved: Path) -> None:
    path = saved / "edit_set.json"
    path.write_text(path.read_text().replace('"model":', '"model": "fedcba9876543210",\n "model":', 1))
    refused(saved, "'model' is there twice")


def test_what_could_not_be_read_is_not_committed(saved: Path) -> None:
    """The version before stays."""
    for wrong in (
        edit_set(4).with_thresholds([Threshold(0.0)] * 2),
        edit_set(4).with_thresholds([Threshold(1.0, 1.0, 0.0)] * 2),
    ):
        with pytest.raises(ValueError, match="cannot be saved"):
            store.save(wrong, saved)
    assert len(store.load(saved).batches) == 3


def test_serving_checks_the_weights_alone(saved: Path) -> None:
    tensors = tensors_of(saved, "weights")
    with_tensors(saved, "weights", {**tensors, "0.U": tensors["0.U"] * 2})
    for read in (store.load_weights, lambda folder: store.load(folder, updates=False)):
        with pytest.raises(ValueError, match="not orthonormal"):
            read(saved)


def test_layers_of_another_size_are_refused_before_they_are_read(saved: Path) -> None:
    """By what the file's header says: the model has [24, 45]."""
    tensors = tensors_of(saved, "weights")
    with_tensors(saved, "weights", {**tensors, "0.B": torch.zeros(6, 46)})
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"0.B has shape \[6, 46\], the model's layer needs \[None, 45\]"):
        load_edits(model, saved, check=False)
    assert not hasattr(model, "coachhook")


@pytest.mark.parametrize("name", ["round_robin", "sequence", "two_batches"])
@pytest.mark.filterwarnings("ignore:settings by former names:FutureWarning")
def test_sets_of_editors_are_sound(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["verify-edits", str(FIXTURES / name), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["edits"] == sum(len(batch.outcomes) for batch in store.load(FIXTURES / name).batches)
    for line in data["layers"]:
        assert line["orthonormality"] < 1e-5
        assert line["disagreement"] < 1e-5
    assert main(["verify-edits", str(FIXTURES / name)]) == 0
    assert "sound" in capsys.readouterr().out
    shutil.copytree(FIXTURES / name, tmp_path / "copy")
    next((tmp_path / "copy").glob("batch-*")).unlink()
    assert main(["verify-edits", str(tmp_path / "copy")]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_ledgers_stay_within_rounding(dtype: torch.dtype) -> None:
    """300 batches on one line of a small layer, changed back and forth, and a third of them rolled back."""
    found = edit_set(300, dtype=dtype)
    for number in range(0, 300, 30):
        found = without(found, f"batch{number:04d}", lambda *_: Threshold(1.0))
    factored = LowRankDelta(torch.linalg.qr(torch.randn(64, 16, dtype=dtype))[0], torch.randn(16, 80, dtype=dtype))
    assert orthonormality(factored) < (1e-5 if dtype == torch.float32 else 1e-13)
    for position in range(2):
        assert disagreement(found, position) < (1e-4 if dtype == torch.float32 else 1e-12)
