"""What the tests of Editor share: a quick configuration, a tiny editor, and its whole state to compare."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tiny import tiny_facts, tiny_model, tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig, Editor, EditRequest, EditWarning
from coachhook_fast.editing.targets import optimise

CONFIG = EditConfig(
    layers=(1, 2), v_num_grad_steps=6, v_lr=0.3, clamp_norm_factor=3.0, mom2_update_weight=5.0, context_tokens=3,
    context_seeds=("The", "You"), threshold_keys=64, stats_sequence_length=48, threshold_rule="zscore", threshold_z=2.0,
)  # fmt: skip
TEXT = "By trade, Clara Quill is a"


def make(family: str = "llama", config: EditConfig = CONFIG, **options: Any) -> Editor:
    editor = Editor(tiny_model(family, **options), tiny_tokenizer(), config)
    editor.collect_statistics(tiny_texts(12), progress=False)
    return editor


def facts(n: int, seed: int = 0) -> list[EditRequest]:
    return [EditRequest(**fact) for fact in tiny_facts(n, seed=seed)]


def edit(editor: Editor, requests: list[EditRequest], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditWarning)  # six steps on a random model: residuals may stay
        return editor.edit(requests, progress=False, **options)


@torch.no_grad()
def logits(model: Any, text: str = TEXT) -> torch.Tensor:
    return model(torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits


def snapshot(editor: Editor) -> list[torch.Tensor]:
    return [
        *(memory.matrix() for memory in editor.memories),
        *(hook.get_delta_weight() for hook in editor.hooks),
        *(torch.tensor(hook.threshold) for hook in editor.hooks),
        logits(editor.model),
    ]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def raising(error: type[BaseException]) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def interrupt_target(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Ctrl-C while the target of that number is about to be found; returned are those begun, one entry each."""
    asked: list[int] = []
    real = optimise.TargetRows.build.__func__  # type: ignore[attr-defined]

    def build(cls: Any, *args: Any) -> Any:
        asked.append(1)
        if len(asked) == number:
            raise KeyboardInterrupt
        return real(cls, *args)

    monkeypatch.setattr(optimise.TargetRows, "build", classmethod(build))
    return asked
