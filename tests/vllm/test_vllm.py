"""The vLLM plugin on SmolLM2 with real edits: the tokens of transformers, in every mode. See prepare.py."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from coachhook_fast.integrations.vllm_modes import disagreements, run_mode

pytestmark = pytest.mark.timeout(700)

WORK = Path(os.environ.get("COACHHOOK_VLLM_WORK", "build/vllm-test")).resolve()


@cache
def expected() -> dict[str, Any]:
    return json.loads((WORK / "expected.json").read_text())


def serve(mode: str, *, swap: bool = False, model: str = "model") -> tuple[dict[str, Any], str]:
    other = str(WORK / "edits-b") if swap else ""
    prompts = expected()["prompts"]
    folder, edits = str(WORK / model), str(WORK / "edits-a")
    return run_mode(mode, folder, edits, prompts, swap_to=other, check_base=model == "model")


def assert_tokens(report: dict[str, Any]) -> None:
    """Equal to transformers' as far as those are certain, after every swap too."""
    for name, version in (("first", "a"), ("again", "a"), ("swapped", "b"), ("back", "a")):
        if name in report:
            certain = expected()[version]
            assert sum(map(len, certain)) > 100
            assert disagreements(report[name], certain) == [], name


def test_eager() -> None:
    report, printed = serve("eager")
    assert_tokens(report)
    assert printed.count("edited 5 layers, edit set ") == 1
    different = sum(a != b for a, b in zip(expected()["a"], expected()["base"], strict=True))
    assert different >= 6  # the edits are what the comparison is about


def test_chunked_prefill_prefix_cache_and_swap() -> None:
    """Chunks of at most 64 tokens; then hits in the prefix cache; then other edits, which must not meet old blocks."""
    report, _ = serve("chunked and cached", swap=True)
    assert_tokens(report)
    first, again, swapped, _ = report["cached"]
    assert again > 100, "no prefix hit"
    assert swapped <= first < again


def test_preemption() -> None:
    report, _ = serve("preempted")
    assert_tokens(report)
    assert report["metrics"]["vllm:num_preemptions"] > 0, "nothing was preempted"


def test_speculative_decoding() -> None:
    report, _ = serve("speculative")
    assert_tokens(report)
    assert report["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


def test_compiled() -> None:
    assert_tokens(serve("compiled", swap=True)[0])


def test_tensor_parallel() -> None:
    """On SmolLM2 with a group of heads more that does nothing: nine heads cannot be shared by two."""
    report, printed = serve("tensor parallel", swap=True, model="twelve-heads")
    assert_tokens(report)
    assert printed.count("edited 5 layers, edit set ") == 2  # a line a worker


# ------------------------------------------------------------------ what stops the start


def config(**settings: Any) -> Any:
    from coachhook_fast.integrations.vllm import EditedConfig

    return EditedConfig.from_config({"quant_method": "coachhook", **settings})


def hf_config(**changes: Any) -> Any:
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(WORK / "model")
    for name, value in changes.items():
        setattr(loaded, name, value)
    return loaded


def test_a_config_that_fits_names_its_version() -> None:
    model = hf_config(quantization_config={"quant_method": "coachhook"})
    fits = config(edit_set=str(WORK / "edits-a"))
    fits.maybe_update_config(str(WORK / "model"), model)
    assert len(fits.digest) == 12
    assert model.quantization_config["edit_set_version"] == fits.digest  # a part of the compile cache's key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "edit_set"),
        ({"edit_set": "x", "surprise": 1}, "surprise"),
        ({"edit_set": "/nowhere"}, "holds no edit set"),
        ({"edit_set": str(WORK / "sequence")}, "sequence gate"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings).maybe_update_config(str(WORK / "model"), hf_config())


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    edits = config(edit_set=str(WORK / "edits-a"))
    with pytest.raises(ValueError, match="has blocks 0 to 5"):
        edits.maybe_update_config(str(WORK / "model"), hf_config(num_hidden_layers=6))
    from safetensors.torch import load_file, save_file

    weights = load_file(WORK / "model" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="another base model"):
        edits.maybe_update_config(str(tmp_path), hf_config())
    config(edit_set=str(WORK / "edits-a"), check_base=False).maybe_update_config(str(tmp_path), hf_config())


def test_layers_of_another_shape() -> None:
    from coachhook_fast.edits import store
    from coachhook_fast.edits.manifest import read_manifest
    from coachhook_fast.integrations.vllm import EditedLinearMethod, frame_of

    delta, threshold = store.load_weights(WORK / "edits-a")[0]
    frame = frame_of(read_manifest(WORK / "edits-a"))
    method = EditedLinearMethod(SimpleNamespace(), "model.layers.4.mlp.down_proj", 0, delta, threshold, 0, frame)
    with pytest.raises(ValueError, match=r"layers.4.mlp.down_proj is \[576, 99\]"):
        method.create_weights(None, 99, [576], 99, 576, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("folder", "served", "message"),
    [
        ("sequence", {}, "has gate 'sequence', served are edits with 'calibrated'"),
        ("edits-b", {"model": "0123"}, "served are edits with '0123'"),
        ("edits-b", {"layers": [4, 5]}, r"has layers \[.*\], served are edits with \[4, 5\]"),
        ("edits-b", {"threshold_relative": False}, "has threshold_relative True"),
        ("edits-b", {"rewrite_module_tmp": "model.layers.{}.mlp.up"}, "has rewrite_module_tmp None"),
        ("edits-b", {}, "larger reserve_rank"),
    ],
)
def test_a_swap_that_does_not_fit_changes_no_layer(folder: str, served: dict[str, Any], message: str) -> None:
    import torch

    from coachhook_fast.edits import store
    from coachhook_fast.edits.manifest import read_manifest
    from coachhook_fast.integrations.vllm import EditedLinearMethod, SwapEdits, frame_of
    from coachhook_fast.integrations.vllm_buffers import write_edits

    manifest, edits = read_manifest(WORK / "edits-a"), store.load_weights(WORK / "edits-a")
    layers = torch.nn.ModuleList()
    for position, (number, (delta, threshold)) in enumerate(zip(manifest["config"]["layers"], edits, strict=True)):
        layer: Any = torch.nn.Module()
        layer.tp_size = 1
        prefix, frame = f"model.layers.{number}.mlp.down_proj", frame_of(manifest) | served
        layer.quant_method = EditedLinearMethod(SimpleNamespace(), prefix, position, delta, threshold, 0, frame)
        for name, tensor in (("B", delta.B), ("U", delta.U)):
            layer.register_buffer(f"coachhook_{name}", torch.zeros_like(tensor))
        layer.register_buffer("coachhook_threshold", torch.zeros(()))
        layer.coachhook_sketch = None
        write_edits(layer, delta, threshold)
        layers.append(layer)
    with pytest.raises(ValueError, match=message):
        SwapEdits(str(WORK / folder))(layers)
    for layer, (delta, _) in zip(layers, edits, strict=True):
        assert torch.equal(layer.coachhook_B, delta.B)


def test_registering_twice_is_harmless() -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    from coachhook_fast.integrations.vllm import EditedConfig, register

    register()
    register()
    assert get_quantization_config("coachhook") is EditedConfig
