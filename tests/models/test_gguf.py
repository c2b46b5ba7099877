"""GGUF files, whose tokenizers transformers has read wrongly without saying so."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import transformers
from bad_inputs import at_once
from tiny import tiny_model, tiny_tokenizer

from coachhook_fast import load_model
from coachhook_fast.models import loading
from coachhook_fast.models.gguf_header import check_gguf_header

pytest.importorskip("gguf")


def tokenizer(*, loses_spaces: bool) -> Any:
    made = tiny_tokenizer()
    if loses_spaces:
        made.backend_tokenizer.decoder = None
    return made


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def gguf_file(*entries: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    """A file of these entries, and no tensors."""
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries) if count is None else count)
    return head + b"".join(entries)


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<IQ", 10, value)


def array(key: str, kind: int, count: int, content: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content


WHOLE = (
    number("llama.block_count", 30),
    number("llama.embedding_length", 576),
    text("a") + struct.pack("<I", 8) + text("x"),
    array("words", 8, 2, text("a") + text("b")),
    array("scores", 6, 2, bytes(8)),
    array("nested", 9, 1, array("", 4, 0)[12:]),
)


def test_a_whole_header_is_taken(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_file(*WHOLE))
    check_gguf_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"GGU", b"GGUF", b"x" * 100, gguf_file(*WHOLE)[:-3], gguf_file(tensors=1 << 62), gguf_file(count=1 << 62),
        gguf_file(count=10_001), gguf_file(count=1), gguf_file(number("llama.block_count", 1_000_000)),
        gguf_file(number("llama.block_count", -1 & (1 << 64) - 1)), gguf_file(number("x.embedding_length", 1 << 40)),
        gguf_file(number("x.vocab_size", 1 << 50)), gguf_file(array("words", 8, 1 << 60)),
        gguf_file(array("numbers", 12, 1 << 61)), gguf_file(array("numbers", 12, 4, bytes(8))),
        gguf_file(array("unknown", 99, 1, bytes(8))), gguf_file(text("k") + struct.pack("<I", 77)),
        gguf_file(struct.pack("<Q", 1 << 63)), gguf_file(text(b"\xff") + struct.pack("<IQ", 10, 1)),
        gguf_file(array("deep", 9, 1, struct.pack("<IQ", 9, 1) * 50)),
    ],
)  # fmt: skip
def test_headers_that_tell_of_what_is_not_there(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with at_once(), pytest.raises(ValueError, match=r"m\.gguf' is no GGUF file that can be loaded: "):
        load_model(str(tmp_path / "m.gguf"))


@pytest.fixture
def read_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every GGUF file hold a tiny model and this tokenizer; answers such a file."""

    def install(found: Any) -> Path:
        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: found)
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tiny_model("llama"))
        path = tmp_path / "some.gguf"
        path.write_bytes(gguf_file())
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
