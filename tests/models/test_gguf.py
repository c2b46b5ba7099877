"""GGUF files, whose tokenizers transformers has read wrongly without saying so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import load_model
from coachhook_fast.models import loading

pytest.importorskip("gguf")


def tokenizer(*, loses_spaces: bool) -> Any:
    made = tiny_tokenizer()
    if loses_spaces:
        made.backend_tokenizer.decoder = None
    return made


@pytest.fixture
def read_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every GGUF file hold a tiny model and this tokenizer; answers such a file."""

    def install(found: Any) -> Path:
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: found)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model("llama"))
        path = tmp_path / "some.gguf"
        path.touch()
        return path

    return install


def test_a_tokenizer_that_gives_texts_back_is_taken(read_as: Any) -> None:
    expected = tokenizer(loses_spaces=False)
    _, found = load_model(str(read_as(expected)), device="cpu")
    assert found is expected


def test_a_tokenizer_that_loses_texts_is_refused(read_as: Any) -> None:
    path = read_as(tokenizer(loses_spaces=True))
    with pytest.raises(ValueError, match=rf"some\.gguf'.*wrongly, '{loading._SENTENCE}' comes back as 'T"):
        load_model(str(path))


def test_a_refused_conversion_is_not_kept(
    read_as: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: Any
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    read_as(tokenizer(loses_spaces=True))
    with pytest.raises(ValueError, match="comes back as"):
        load_model("smollm2")
    assert not list(tmp_path.glob("cache/models/*"))
