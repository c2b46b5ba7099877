"""An answer as it is written: characters in pieces, stop strings across tokens, ends; and how a token is drawn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import EOS, tiny_tokenizer

from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.generation import decoder
from coachhook_fast.serve.rows import Piece, Row, Sampling
from coachhook_fast.serve.sampling import Draws, Watch, draw

DECODE = decoder(tiny_tokenizer())


def written(text: str, *, after: Sequence[int] = (), **options: Any) -> list[Piece]:
    """The pieces of a row that gets the tokens of `text`, and then those of `after`."""
    ids = [*tiny_tokenizer()(text).input_ids, *after]
    pieces: list[Piece] = []
    row = Row(0, (1,), Sampling(**{"max_tokens": len(ids), **options}), DECODE, pieces.append)
    for token in ids:
        if not row.done:
            row.push(token, [EOS])
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize(
    "text", ["Hello there, you.", "snow ☃ and 🦊🦊, déjà vu", "  two  spaces \n\n lines ", "日本語のテキスト"]
)
def test_pieces_are_the_text_and_no_character_comes_in_halves(text: str) -> None:
    pieces = written(text)
    assert text_of(pieces) == text
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.finish for piece in pieces][-1] == "length"
    assert len(pieces) > 3


@pytest.mark.parametrize("stop", [("there",), ("lo th",), ("re, y", "never"), ("H",), (",",)])
def test_a_text_ends_before_its_stop_string(stop: tuple[str, ...]) -> None:
    text = "Hello there, you."
    pieces = written(text, stop=stop)
    assert text_of(pieces) == text[: text.index(stop[0])]
    assert pieces[-1].finish == "stop"


def test_what_looked_like_a_stop_string_is_given_in_the_end() -> None:
    assert text_of(written("Hello the", stop=("there",))) == "Hello the"
    ended = written("Hello the", after=[EOS], stop=("there",), max_tokens=99)
    assert text_of(ended) == "Hello the"
    assert ended[-1].finish == "stop"


def test_a_character_cut_off_by_the_end_is_shown_as_such() -> None:
    ids = tiny_tokenizer()("☃").input_ids
    assert len(ids) == 3
    pieces: list[Piece] = []
    row = Row(0, (1,), Sampling(max_tokens=2), DECODE, pieces.append)
    for token in ids[:2]:
        row.push(token, [])
    assert set(text_of(pieces)) == {"\ufffd"}


def test_draws_follow_the_distribution() -> None:
    scores = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    for options, expected in (
        ({"temperature": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 1.0, "top_p": 0.79}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.25, 0.09, 0.0225, 0.0025]),
    ):
        counts = Counter(draw(scores, Sampling(**options), generator) for _ in range(4000))
        total = sum(expected)
        for token, share in enumerate(expected):
            assert counts[token] / 4000 == pytest.approx(share / total, abs=0.03)
            assert share or not counts[token]


@pytest.mark.parametrize("temperature", [1e-320, 1e-5, 1e-3, 2.0])
def test_extreme_scores_and_temperatures_draw_a_token(temperature: float) -> None:
    scores = torch.tensor([[1e30, -1e30, float("-inf"), 3e38]])
    row = Row(0, (1,), Sampling(temperature=temperature), DECODE, lambda piece: None)
    allowed = Draws([row])(torch.zeros(1, 1), scores)
    assert allowed.argmax() == 3
    assert not row.done


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_end_their_row_alone(bad: float, temperature: float) -> None:
    pieces: list[Piece] = []
    rows = [Row(index, (1,), Sampling(temperature=temperature), DECODE, pieces.append) for index in range(2)]
    Draws(rows)(torch.zeros(2, 1), torch.tensor([[0.0, bad, 1.0], [0.0, 2.0, 1.0]]))
    assert [row.done for row in rows] == [True, False]
    assert isinstance(pieces[0].error, ApiError)
    assert pieces[0].error.status == 503


def test_answers_that_take_too_long_end_with_an_error() -> None:
    pieces: list[Piece] = []
    row = Row(0, (1,), Sampling(max_tokens=9), DECODE, pieces.append)
    watch = Watch([row], [], seconds=0.02)
    assert not watch(torch.tensor([[5]]), torch.zeros(1, 9)).any()
    time.sleep(0.03)
    assert watch(torch.tensor([[5]]), torch.zeros(1, 9)).all()
    assert isinstance(pieces[-1].error, ApiError)
    assert "0.02 s" in pieces[-1].error.message
