"""Quantised bases: a fingerprint of what they hold, no edit where their gradient does not say how the loss falls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, edit, facts, logits, make
from tiny import tiny_model, tiny_texts, tiny_tokenizer
from torch import Tensor, nn

from coachhook_fast import Editor, load_edits
from coachhook_fast.editing.gradients import check_gradients, foreign_linears
from coachhook_fast.hooks.hooks import hooks_of
from coachhook_fast.models.loading import fingerprint
from coachhook_fast.models.passes.forward import PartialModel

# Widths that groups of 32 weights divide.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "initializer_range": 0.1}
TEXT = facts(1)[0].text
START_LOSS = 6.5


def base(**options: Any) -> Any:
    return tiny_model("llama", **SIZES, **options)


class Odd(nn.Linear):
    """A linear layer of another class; its backward pass is `gradient`."""

    gradient: Callable[[Tensor], Tensor] = staticmethod(lambda g: g)

    def forward(self, x: Tensor) -> Tensor:
        weight, change = self.weight, self.gradient

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x @ weight.T

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Tensor:
                return change(gradients[0] @ weight)

        return Product.apply(x)  # type: ignore[no-any-return]


def with_odd_layers(model: Any, gradient: Callable[[Tensor], Tensor], name: str = "_proj") -> Any:
    for path, module in list(model.named_modules()):
        if path.endswith(name):
            module.__class__ = Odd
            module.gradient = gradient
    return model


def checked(model: Any) -> None:
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    row = facts(1)[0].tokenise(tiny_tokenizer(), ("x",)).bare
    check_gradients(editor.partial, 2, row, pad_id=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_gradients_of_other_layers_pass(dtype: torch.dtype) -> None:
    model = with_odd_layers(base(dtype=dtype), lambda g: g)
    assert foreign_linears(model) == ["Odd"]
    checked(model)


@pytest.mark.parametrize(
    ("gradient", "name", "what"),
    [
        (lambda g: -g, "v_proj", "along it the loss changes by"),
        (lambda g: g.flip(-1), "_proj", "along it the loss changes by"),
        (torch.zeros_like, "_proj", "it is 0.0"),
        (lambda g: g * torch.nan, "_proj", "it is nan"),
    ],
    ids=["negative", "shuffled", "zero", "nan"],
)
def test_false_gradients_are_refused(gradient: Any, name: str, what: str) -> None:
    model = with_odd_layers(base(), gradient, name)
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    editor.collect_statistics(tiny_texts(12), progress=False)
    with pytest.raises(ValueError, match=rf"gradient cannot be trusted, through Odd.*check=False.*{what}"):
        edit(editor, facts(2))
    assert editor.edit_set.num_edits == 0
    assert editor.hooks[0].mode == "gated"


def test_plain_models_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "gpt2"):
        assert foreign_linears(tiny_model(family)) == []
        assert foreign_linears(make(family).model) == []
    partial, row = make().partial, facts(1)[0].tokenise(tiny_tokenizer(), ("x",)).bare
    monkeypatch.setattr(PartialModel, "run", lambda *_, **__: pytest.fail("a pass"))
    check_gradients(partial, 2, row, pad_id=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    editor = Editor(base(), tiny_tokenizer(), CONFIG.replace(threshold_z=0.5))
    editor.collect_statistics(tiny_texts(12), progress=False)
    edit(editor, facts(2))
    editor.save_pretrained(folder)
    return folder


def torchao_model(kind: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8WeightOnlyConfig,
    }[kind]()
    model = base(**options)
    quantization.quantize_(
        model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "head" not in name
    )
    return model


@pytest.mark.parametrize("kind", ["int8", "int8 dynamic", "float8"])
def test_torchao(kind: str, saved: Path, tmp_path: Path) -> None:
    model = torchao_model(kind)
    assert fingerprint(model) == fingerprint(torchao_model(kind)) != fingerprint(base())
    assert fingerprint(model) != fingerprint(torchao_model(kind, seed=1))
    with pytest.raises(ValueError, match=r"another base model.*check=False"):
        load_edits(model, saved)
    clean = logits(model, TEXT)
    load_edits(model, saved, check=False)
    assert not torch.equal(logits(model, TEXT), clean)
    model.coachhook.unload()
    assert torch.equal(logits(model, TEXT), clean)
    editor = Editor(model, tiny_tokenizer(), CONFIG.replace(threshold_z=0.5))
    editor.collect_statistics(tiny_texts(12), progress=False)
    if edited_or_refused(editor) is None:
        assert kind == "int8 dynamic"  # rounds its input: it has no gradient, or one that says little
        return
    editor.save_pretrained(tmp_path)
    expected = logits(model, TEXT)
    assert torch.equal(logits(load_edits(torchao_model(kind), tmp_path), TEXT), expected)


def edited_or_refused(editor: Editor) -> list[float] | None:
    """The losses left; None where the edit was refused for the base's gradients, and left nothing."""
    try:
        return [outcome.loss for outcome in edit(editor, facts(2)).outcomes]
    except ValueError as error:
        if "gradient cannot be trusted, through Linear" not in str(error):
            raise
        return None


@pytest.mark.filterwarnings("ignore")
def test_dynamic_int8_is_refused(saved: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(base(), {nn.Linear}, dtype=torch.qint8)
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    editor.collect_statistics(tiny_texts(12), progress=False)
    with pytest.raises(ValueError, match=r"gradient cannot be trusted, through (Dynamic)?.*Linear"):
        edit(editor, facts(2))
    editor.unload()
    clean = logits(model, TEXT)
    load_edits(model, saved, check=False)
    assert not torch.equal(logits(model, TEXT), clean)


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_bitsandbytes(kind: str, saved: Path) -> None:
    """Whatever its kernels do on this machine: edited where the gradient is true, else refused; edits serve."""
    bnb = pytest.importorskip("bitsandbytes")
    model = base()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is model.lm_head:
                continue
            size = (child.in_features, child.out_features)
            if kind == "4-bit":
                layer = bnb.nn.Linear4bit(*size, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                layer.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, layer.to("cpu"))
    model.eval()
    clean = logits(model, TEXT)
    assert len(fingerprint(model)) == 16
    load_edits(model, saved, check=False)
    assert not torch.equal(logits(model, TEXT), clean)
    copied = logits(copy.deepcopy(model), TEXT)
    assert torch.equal(copied, logits(model, TEXT))
    model.coachhook.unload()
    assert torch.equal(logits(model, TEXT), clean)
    editor = Editor(model, tiny_tokenizer(), CONFIG)
    editor.collect_statistics(tiny_texts(12), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = edited_or_refused(editor)
    assert losses is None or all(loss < START_LOSS for loss in losses)
    assert hooks_of(model) is not None
