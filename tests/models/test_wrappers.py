"""An edit set knows its base model within wrappers, and says what another model has otherwise."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make
from tiny import tiny_model, tiny_texts, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from coachhook_fast import Editor, HookLinear, load_edits
from coachhook_fast.hooks.hooks import hooks_of
from coachhook_fast.models.loading import fingerprint

TEXT = facts(1)[0].text


def says(model: Any) -> torch.Tensor:
    return logits(model, TEXT)


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """(folder of an edit set of the tiny Llama, what the edited model says)"""
    folder = tmp_path_factory.mktemp("edits")
    editor = make(config=CONFIG.replace(threshold_z=0.5))
    edit(editor, facts(2))
    editor.save_pretrained(folder)
    return folder, says(editor.model)


@pytest.fixture
def one_process() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_wrappers(edits: tuple[Path, torch.Tensor], one_process: None) -> None:
    model = nn.parallel.DistributedDataParallel(tiny_model("llama"))
    assert load_edits(model, edits[0]) is model
    assert torch.equal(says(model), edits[1])
    assert hooks_of(model) is model.module.coachhook


def test_compiled_wrappers(edits: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model = torch.compile(tiny_model("llama"), backend="eager")
    assert fingerprint(model) == fingerprint(tiny_model("llama"))
    load_edits(model, edits[0])
    torch.testing.assert_close(says(model), edits[1], rtol=1e-4, atol=1e-4)
    editor = Editor(torch.compile(tiny_model("llama"), backend="eager"), tiny_tokenizer(), CONFIG)
    editor.collect_statistics(tiny_texts(12), progress=False)
    edit(editor, facts(2))
    editor.save_pretrained(tmp_path)
    assert torch.equal(says(load_edits(tiny_model("llama"), tmp_path)), says(editor.model))
    blocks = tiny_model("llama")  # block by block, as regional compilation does
    for number, block in enumerate(blocks.model.layers):
        blocks.model.layers[number] = torch.compile(block, backend="eager")
    assert fingerprint(blocks) == fingerprint(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"model.layers.0 is compiled by itself.*edit the model first"):
        Editor(blocks, tiny_tokenizer(), CONFIG)
    torch.testing.assert_close(says(load_edits(blocks, edits[0])), edits[1], rtol=1e-4, atol=1e-4)


def test_what_differs_is_named(edits: tuple[Path, torch.Tensor]) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(324)
    with pytest.raises(ValueError, match=r"another base model.*model.embed_tokens.weight was 320x24, here 324x24"):
        load_edits(model, edits[0])
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[3].self_attn.q_proj.weight += 1
    with pytest.raises(ValueError, match=r"what differs: model.layers.\*.self_attn.q_proj.weight has other values \("):
        load_edits(model, edits[0])
    with pytest.raises(ValueError, match=r"was 5 of 24x45, here 4 of 24x45"):
        load_edits(tiny_model("llama", num_hidden_layers=4), edits[0])
    with pytest.raises(ValueError, match=r"lm_head.weight is in theirs alone"):
        load_edits(tiny_model("llama", tie_word_embeddings=True), edits[0])


def test_sets_of_earlier_versions_say_the_fingerprint_alone(edits: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(edits[0], tmp_path / "old")
    path = tmp_path / "old" / "edit_set.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("base")["model.embed_tokens.weight"].startswith("320x24 ")
    path.write_text(json.dumps(manifest))
    assert torch.equal(says(load_edits(tiny_model("llama"), tmp_path / "old")), edits[1])
    with pytest.raises(ValueError, match=r"this model's is [0-9a-f]{16} \(a copy"):
        load_edits(tiny_model("llama", seed=1), tmp_path / "old")


def test_models_of_shapes_alone(edits: tuple[Path, torch.Tensor]) -> None:
    config = tiny_model("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    message = "parameter model.embed_tokens.weight is on the meta device, which holds no values: load the weights first"
    with pytest.raises(ValueError, match=message):
        load_edits(model, edits[0])
    with pytest.raises(ValueError, match=message):
        Editor(model, tiny_tokenizer(), CONFIG)
    assert not hasattr(model, "coachhook")


@pytest.mark.parametrize("how", ["dispatch_model", "cpu_offload", "disk_offload"])
@pytest.mark.parametrize("order", ["edits first", "offloaded first"])
def test_accelerate_in_either_order(edits: tuple[Path, torch.Tensor], how: str, order: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def offload(model: Any) -> Any:
        if how == "cpu_offload":
            return accelerate.cpu_offload(model, execution_device="cpu")
        if how == "disk_offload":
            return accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
        parts = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        parts |= {f"model.layers.{number}": "disk" if number in (1, 3) else "cpu" for number in range(5)}
        return accelerate.dispatch_model(
            model, parts, main_device="cpu", offload_dir=str(tmp_path / "weights"), force_hooks=True
        )

    model = tiny_model("llama")
    model = offload(load_edits(model, edits[0])) if order == "edits first" else load_edits(offload(model), edits[0])
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert torch.equal(says(model), edits[1])
    assert fingerprint(model) == fingerprint(tiny_model("llama"))
    model.coachhook.unload()
    assert torch.equal(says(model), says(tiny_model("llama")))


def test_save_pretrained_of_the_model_says_where_the_edits_go(edits: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model = load_edits(tiny_model("llama"), edits[0])
    with pytest.warns(
        UserWarning, match=r"writes the base model alone, without its 2 edits.*load_edits\(model, folder\)"
    ):
        model.save_pretrained(tmp_path)
    assert torch.equal(says(AutoModelForCausalLM.from_pretrained(tmp_path)), says(tiny_model("llama")))
    model.coachhook.unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def copies(model: Any) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    return {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model)), "torch.save": loaded}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_are_edited_and_their_own(family: str) -> None:
    editor = make(family, CONFIG.replace(threshold_z=0.5))
    edit(editor, facts(2))
    model, expected = editor.model, says(editor.model)
    clean = says(tiny_model(family))
    for name, other in copies(model).items():
        assert torch.equal(says(other), expected), name
        hooks = [module for module in other.modules() if isinstance(module, HookLinear)]
        assert all(hook.weight is hook.base.weight for hook in hooks)
        assert hooks == other.coachhook.hooks
        other.coachhook.unload()
        assert torch.equal(says(other), clean), name
        assert torch.equal(says(model), expected), name


def test_a_state_dict_is_the_base_models(edits: tuple[Path, torch.Tensor]) -> None:
    model, base = load_edits(tiny_model("llama"), edits[0]), tiny_model("llama", seed=1)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    model.load_state_dict(base.state_dict())
    model.coachhook.unload()
    assert torch.equal(says(model), says(base))
