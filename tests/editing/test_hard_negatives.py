"""Hard negatives: which texts are found, and that an edit passes them by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editor_cases import CONFIG, edit, make
from tiny import tiny_tokenizer
from torch import Tensor

from coachhook_fast import EditConfig, Editor, EditRequest
from coachhook_fast.config import PAPER, ROUND_ROBIN_SETTINGS
from coachhook_fast.editing.hard_negatives import find_hard_negatives
from coachhook_fast.edits.manifest import MANIFEST
from coachhook_fast.request import TokenisedRequest, tokenise_batch
from coachhook_fast.statistics.corpus import BOUNDARY, joined
from coachhook_fast.statistics.key_statistics import KeyStatistics

TOKENIZER = tiny_tokenizer()


def tokenised(*subjects: str) -> list[TokenisedRequest]:
    requests = [EditRequest(prompt="{} works as a", subject=subject, target_new="pilot") for subject in subjects]
    return tokenise_batch(requests, TOKENIZER, ["The"], None)


def text_of(*documents: str) -> Tensor:
    return joined([TOKENIZER(document, add_special_tokens=False)["input_ids"] for document in documents])


def found(text: Tensor, *subjects: str, most: int = 8, begin: tuple[int, ...] = ()) -> list[str]:
    rows = find_hard_negatives(text, tokenised(*subjects), TOKENIZER, begin=begin, most=most)
    assert all(row.lookup == len(row.prompt) - 1 and row.target == () for row in rows)
    assert all(row.prompt[: len(begin)] == begin for row in rows)
    return [TOKENIZER.decode(list(row.prompt[len(begin) :])) for row in rows]


def test_texts_that_end_in_the_subjects_last_token() -> None:
    text = text_of("A calm river at noon", "Some other words", "They saw the Quiet River and went")
    last = TOKENIZER.decode([tokenised("Stone River")[0].bare.prompt[tokenised("Stone River")[0].bare.lookup]])
    ends = found(text, "Stone River")
    assert ends
    assert all(end.endswith(last) for end in ends)


def test_the_subject_itself_is_none_of_them() -> None:
    alone = text_of("By the Stone River we sat", "and Stone River flows")
    assert found(alone, "Stone River") == []
    both = text_of("By the Stone River we sat", "by the Stolen River we sat")
    assert found(both, "Stone River") == ["by the Stolen River"]
    # another subject of the batch is none either, though the first alone would have passed it by
    assert found(both, "Stone River", "Stolen River") == []


def test_one_for_each_token_before_and_evenly_spread() -> None:
    letters = "abcdefghijklmnop"
    text = text_of(*(f"xx {letter}9 yy {letter}9" for letter in letters))
    ends = found(text, "Unit 9", most=4)
    assert len(ends) == 4
    assert len({end[-2] for end in ends}) == 4
    assert ends[0][-2] == "a"
    assert ends[-1][-2] > "i"
    assert len(found(text, "Unit 9", most=100)) == len(letters)
    assert found(text, "Unit 9", most=0) == []


def test_windows_end_at_documents_and_begin_as_the_tokenizer_does() -> None:
    long = " ".join(["word"] * 60) + " z9"
    text = text_of("unrelated", "q9", long, "9")
    assert int((text == BOUNDARY).sum()) == 4
    ends = found(text, "Unit 9", begin=(2,))
    assert ends[0] == "q9"
    assert "unrelated" not in "".join(ends)
    assert len(ends) == 2  # the document that begins with the token is not one: it stands at the attention sink
    rows = find_hard_negatives(text, tokenised("Unit 9"), TOKENIZER, begin=(2,), most=8)
    assert max(len(row.prompt) for row in rows) == 33


def test_no_text_and_subjects_of_one_token() -> None:
    assert (
        find_hard_negatives(torch.empty(0, dtype=torch.int32), tokenised("Stone River"), TOKENIZER, begin=(), most=8)
        == []
    )
    assert found(text_of("q9 and z9"), "9") == []


def test_an_edit_passes_its_hard_negatives_by() -> None:
    """‖Δk‖ at the hard negatives' keys falls against that of the edit's own."""
    request = EditRequest(prompt="{} works as a", subject="Doctor Stone", target_new="pilot")
    text = text_of("we met old Mister Stone", "a wall of grey stone", "then young Father Stone")

    def edited(most: int) -> tuple[Editor, dict[str, Tensor]]:
        editor = make(config=CONFIG.replace(hard_negatives=most))
        assert editor.statistics is not None
        editor.use_statistics(replace(editor.statistics, text=text))
        seen: list[dict[str, Tensor]] = []
        edit(editor, [request], observer=lambda event, _, **found: seen.append(found) if event == "update" else None)
        return editor, seen[0]

    def answers(editor: Editor, keys: Tensor) -> Tensor:
        return (editor.hooks[0].get_delta_weight().double() @ keys).norm(dim=0)

    (with_them, found), (without, plain) = edited(8), edited(0)
    K, N = found["K"], found["N"]
    assert N.shape[1] >= 2
    assert plain["N"].shape[1] == 0
    torch.testing.assert_close(K, plain["K"])
    assert answers(with_them, N).max() / answers(with_them, K) < 0.7 * answers(without, N).max() / answers(without, K)
    assert answers(with_them, K) > 0.3 * answers(without, K)
    for one, other in zip(with_them.memories[:1], without.memories[:1], strict=True):  # N is not remembered
        torch.testing.assert_close(one.matrix(), other.matrix())


def test_statistics_keep_the_text(tmp_path: Path) -> None:
    editor = make()
    assert editor.statistics is not None
    assert editor.statistics.text.dtype == torch.int32
    assert int((editor.statistics.text == BOUNDARY).sum()) == 12  # documents
    editor.statistics.save(tmp_path / "s.safetensors")
    assert torch.equal(KeyStatistics.load(tmp_path / "s.safetensors").text, editor.statistics.text)
    short = make(config=CONFIG.replace(hard_negative_tokens=10))
    assert short.statistics is not None
    assert int((short.statistics.text != BOUNDARY).sum()) == 10


@pytest.mark.parametrize(
    ("settings", "blocks", "width", "expected"),
    [
        ({}, 30, 1536, (tuple(range(7, 16)), 9, 8)),
        ({}, 28, 16384, (tuple(range(8, 13)), 5, 8)),
        ({}, 18, 2048, (tuple(range(4, 10)), 6, 8)),
        ({"specific": False}, 30, 1536, (tuple(range(2, 11)), 9, 8)),
        ({"specific": False}, 28, 16384, (tuple(range(4, 9)), 5, 8)),
        ({"specific": False}, 18, 2048, (tuple(range(1, 7)), 6, 8)),
        ({"round_robin": 1}, 30, 1536, (tuple(range(4, 9)), 1, 0)),
        ({"round_robin": 3}, 30, 1536, (tuple(range(7, 16)), 3, 8)),
        ({"layers": (4, 5)}, 30, 1536, ((4, 5), 1, 0)),
        ({"layers": (4, 5), "round_robin": 2}, 30, 1536, ((4, 5), 2, 8)),
        ({"hard_negatives": 0}, 30, 1536, (tuple(range(7, 16)), 9, 0)),
        ({"gate": "sequence"}, 30, 1536, (tuple(range(4, 9)), 1, 0)),
        (PAPER, 30, 1536, (tuple(range(4, 9)), 1, 0)),
        ({}, 2, 64, ((1,), 1, 0)),
    ],
)
def test_what_the_defaults_are(settings: dict, blocks: int, width: int, expected: tuple) -> None:
    config = EditConfig(**settings).resolved(blocks, width)
    assert (config.layers, config.round_robin, config.hard_negatives) == expected
    assert config.threshold_relative == config.threshold_whitened == (expected[1] > 1)
    assert config.short_prefixes == (0.2 if expected[1] > 1 else 0.0)
    assert config.resolved(blocks, width) == config


def test_more_turns_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="round_robin must be at most"):
        EditConfig(round_robin=7).resolved(28, 16384)


def test_sets_of_earlier_versions_go_on_as_they_were(tmp_path: Path) -> None:
    editor = make()
    edit(editor, [EditRequest(prompt="{} works as a", subject="Doctor Stone", target_new="pilot")])
    editor.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for name in (*ROUND_ROBIN_SETTINGS, "hard_negative_tokens"):
        del manifest["config"][name]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    editor.unload()
    again = Editor(editor.model, TOKENIZER, edits=tmp_path)
    assert [getattr(again.config, name) for name in ROUND_ROBIN_SETTINGS] == [1, 1.0, 0, 0.0, False, False]


@pytest.mark.parametrize("settings", [{"hard_negatives": -1}, {"hard_negatives": 1.5}, {"hard_negative_tokens": -1}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises((TypeError, ValueError), match="hard_negative"):
        EditConfig(**settings)
