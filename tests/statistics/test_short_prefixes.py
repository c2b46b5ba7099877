"""Beginnings of texts among the key statistics' documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from editor_cases import CONFIG, make
from tiny import tiny_texts, tiny_tokenizer

from coachhook_fast import EditConfig
from coachhook_fast.statistics.corpus import with_short_prefixes


def documents() -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(text)["input_ids"] for text in tiny_texts(20)]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_their_share_and_the_documents_in_order(share: float) -> None:
    given = documents()
    found = list(with_short_prefixes(given, tiny_tokenizer(), share))
    assert [text for text in found if text in given] == given
    short = [text for text in found if text not in given]
    tokens = sum(map(len, short))
    assert tokens / (tokens + sum(map(len, given))) == pytest.approx(share, abs=0.01)
    assert max(map(len, short)) <= 6
    assert list(with_short_prefixes(given, tiny_tokenizer(), share)) == found
    assert list(with_short_prefixes(given, tiny_tokenizer(), share, seed=1)) != found


def test_they_begin_with_words_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    given = documents()
    words = {word for text in tiny_texts(20) for word in text.split()}
    for text in with_short_prefixes(given, tokenizer, 0.3):
        if text not in given:
            first = tokenizer.decode(text).split()[0]
            assert any(word.startswith(first) for word in words), first
            assert tokenizer.convert_ids_to_tokens(text[0])[:1] != "Ġ"


def test_tokens_without_spaces_and_short_documents() -> None:
    class Bare:
        """A tokenizer that does not show where words begin."""

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["x"] * len(ids)

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    found = list(with_short_prefixes([[5, 6, 7], list(range(50))], Bare(), 0.5))
    assert found[:2] == [[5, 6, 7], list(range(50))]
    assert all(len(text) == 6 and text == list(range(text[0], text[0] + 6)) for text in found[2:])
    assert len(found) > 5
    assert list(with_short_prefixes([[5, 6, 7]] * 9, Bare(), 0.5)) == [[5, 6, 7]] * 9  # no room for one
    burst = list(
        with_short_prefixes([[5, 6, 7]] * 99 + [list(range(24))], Bare(), 0.2)
    )  # nor do they all fall to the next
    assert len(burst) == 102


def test_statistics_of_round_robin_layers_hold_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    round_robin = CONFIG.replace(layers=(0, 1, 2), round_robin=3)
    tokens = {}
    for name, config in (
        ("paper", CONFIG),
        ("round_robin", round_robin),
        ("off", round_robin.replace(short_prefixes=0.0)),
    ):
        editor = make(config=config)
        tokens[name] = editor.collect_statistics(tiny_texts(20), progress=False).tokens
        editor.unload()
    assert tokens["paper"] == tokens["off"]
    assert tokens["round_robin"] == pytest.approx(tokens["paper"] / 0.8, rel=0.05)


@pytest.mark.parametrize("value", [-0.1, 1.0, "many"])
def test_bad_shares(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="short_prefixes"):
        EditConfig(short_prefixes=value)


def test_a_short_prefix_stands_at_the_beginning() -> None:
    """Packed rows start every text anew, so a short prefix's tokens have the first positions."""
    from coachhook_fast.statistics.corpus import pack_rows

    texts = list(with_short_prefixes(documents(), tiny_tokenizer(), 0.3))
    starts = sum(int((positions == 0).sum()) for _, positions in pack_rows(texts, [], 64))
    assert starts >= len(texts)
    assert torch.tensor([len(text) for text in texts]).float().median() <= 6
