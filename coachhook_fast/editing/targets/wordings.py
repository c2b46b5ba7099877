"""Wordings: what else a request's question may be called, and what else may be asked about its subject.

An edit prompt says one wording of one question. The editor knows some hundred questions that texts ask about people,
places, organisations and works, each in a few wordings of our own (relations.json). The question nearest to the prompt
gives paraphrases, which get the target too; the other questions about the same kind of subject are what an edit must
leave alone. A prompt near none gets no paraphrases, and questions about all kinds of subjects to leave alone.

Near is measured by the model itself: its states at the last token of a text about two made-up subjects, less the mean
over all wordings, as cosines, and by the words that both have, weighted by how few questions have them.
docs/experiments/specificity.md says how often this is right.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook_fast.chat import chat_text
from coachhook_fast.editing.targets.bank import cached_states
from coachhook_fast.models.passes.forward import PartialModel, align_rows
from coachhook_fast.request import SLOT, EditRequest, filled, prompt_ids, slotted, subject_key

# Subjects that no relation speaks for: a name and a place.
_SUBJECTS = ("Alex Miller", "Northfield")
# Blocks whose states are compared, as shares of the depth.
_DEPTHS = (0.67, 0.8, 0.93)
# Words count half of what states do.
_WORDS = 0.5
# From here on a wording asks the prompt's question; up to there it asks another.
_SAME = 0.8
_OTHER = 0.55
_FEW_LETTERS = 6  # of a word: "employed", "employer", "employment"
_SMALL_WORDS = {
    "the", "a", "an", "of", "in", "is", "was", "were", "are", "to", "by", "for", "with", "on", "at", "as", "that", "it",
    "and", "from", "has", "have", "which", "its", "his", "her", "he", "she", "they", "what", "who", "be", "been",
    "where", "whose", "name", "called",
}  # fmt: skip
_ROWS = 128  # texts a pass


@dataclass(frozen=True)
class Wording:
    """A text with one slot for the subject: one wording of one question about one kind of subject. One that is `plain`
    is made of the relation's name, to be compared with and not to be read; one that `is_question` is read as somebody
    asks it (`asked`)."""

    kind: str
    relation: str
    text: str
    plain: bool = False
    is_question: bool = False


def read_wordings() -> tuple[Wording, ...]:
    """The wordings of relations.json, and two plain ones of each relation's own name."""
    kinds = json.loads(files("coachhook_fast.editing.targets").joinpath("relations.json").read_text(encoding="utf-8"))
    found = []
    for kind, relations in kinds.items():
        for relation, texts in relations.items():
            plain = [f"The {relation} of {SLOT} is", f"{SLOT}'s {relation} is"]
            found += [Wording(kind, relation, text, is_question=text.endswith("?")) for text in texts]
            found += [Wording(kind, relation, text, plain=True) for text in plain if text not in texts]
    return tuple(found)


def as_asked(tokenizer: Any, question: str) -> str:
    """The text behind which a model answers `question`: the tokenizer's chat template where it has one."""
    text = chat_text(tokenizer, question)
    if text is None or text.count(SLOT) != 1:
        return f"Question: {question}\nAnswer:"
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text[len(begin) :]  # tokenising puts it there again
    return text


class Wordings:
    """Finds wordings for requests, as one model reads them.

    The bank is read once, with the model as it stands; the caller switches edits off.
    """

    def __init__(self, partial: PartialModel, tokenizer: Any, model_id: str, *, pad_id: int) -> None:
        """`model_id`: the model's fingerprint, under which what it makes of the bank is cached."""
        self._partial, self._tokenizer, self._pad_id = partial, tokenizer, pad_id
        count = len(partial.blocks)
        self._blocks = sorted({min(count - 1, round(depth * count)) for depth in _DEPTHS})
        wordings = read_wordings()
        # As somebody asks it, which is long: prompts are compared with the others alone.
        self.questions = [
            replace(wording, text=as_asked(tokenizer, wording.text)) for wording in wordings if wording.is_question
        ]
        self.bank = [wording for wording in wordings if not wording.is_question]
        self._words = [_words(f"{wording.text} {wording.relation}") for wording in self.bank]
        questions = {(wording.kind, wording.relation): set[str]() for wording in self.bank}
        for wording, words in zip(self.bank, self._words, strict=True):
            questions[wording.kind, wording.relation] |= words
        held = Counter(word for words in questions.values() for word in words)
        self._rarity = {word: math.log(len(questions) / count) for word, count in held.items()}
        self._unknown = math.log(len(questions))
        rows = self._rows([wording.text for wording in self.bank])
        states = cached_states(model_id, rows, self._blocks, lambda: self._states(rows))
        self._mean = states.mean(0)
        self._states_of_bank = normalize(states - self._mean, dim=-1)

    def find(
        self, requests: Sequence[EditRequest], *, paraphrases: int, keep: int
    ) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Of each request: texts that ask its question, as many as are short of `paraphrases` with its own, and `keep`
        texts that ask nothing that it or another request about its subject asks; each with one slot."""
        asked = [
            [slotted(text, request.subject) for text in (request.prompt, *request.paraphrases)] for request in requests
        ]
        templates = list(dict.fromkeys(template for group in asked for template in group))
        states = normalize(self._states(self._rows(templates)) - self._mean, dim=-1)
        near = torch.einsum("rcd,bcd->rb", states, self._states_of_bank) / states.shape[1]
        scores = {t: self._scores(t, row) for t, row in zip(templates, near.tolist(), strict=True)}
        subjects: dict[str, set[str]] = {}
        for request, group in zip(requests, asked, strict=True):
            subjects.setdefault(subject_key(request.subject), set()).update(group)
        return [
            self._of_request(
                request, group, [scores[t] for t in sorted(subjects[subject_key(request.subject)])], scores[group[0]],
                max(0, paraphrases - len(request.paraphrases)), keep,
            )
            for request, group in zip(requests, asked, strict=True)
        ]  # fmt: skip

    def _scores(self, template: str, near: Sequence[float]) -> list[float]:
        words = _words(template)
        whole = sum(self._rarity.get(word, self._unknown) for word in words) or 1.0
        shared = [sum(self._rarity[word] for word in words & other) / whole for other in self._words]
        return [state + _WORDS * word for state, word in zip(near, shared, strict=True)]

    def _of_request(
        self,
        request: EditRequest,
        asked: Sequence[str],
        of_subject: Sequence[Sequence[float]],
        scores: Sequence[float],
        paraphrases: int,
        keep: int,
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """`asked`: the request's own templates; `of_subject`: the bank's scores for each template about its subject in
        the batch; `scores`: those for its prompt."""
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
        best = self.bank[order[0]]
        matched = scores[order[0]] >= _SAME
        asking = [wording for wording in (*map(self.bank.__getitem__, order), *self.questions) if _same(wording, best)]
        same = _all_ways([wording for wording in asking if wording.text not in asked])[:paraphrases] if matched else []
        nearest: dict[tuple[str, str], float] = {}
        for i, wording in enumerate(self.bank):
            highest = max(row[i] for row in of_subject)
            question = wording.kind, wording.relation
            nearest[question] = max(highest, nearest.get(question, highest))
        others = [
            wording
            for wording in self.bank  # not the questions: chat templates are long, and all steps would carry them
            if not wording.plain
            and nearest[wording.kind, wording.relation] < _OTHER
            and (wording.kind == best.kind or not matched)
        ]
        return tuple(same), tuple(_spread(others, request.text)[:keep])

    def _rows(self, templates: Sequence[str]) -> list[list[int]]:
        """Tokens of each template about each of _SUBJECTS."""
        return [prompt_ids(self._tokenizer, filled(text, subject)) for text in templates for subject in _SUBJECTS]

    @torch.no_grad()
    def _states(self, rows: Sequence[list[int]]) -> Tensor:
        """[T, subjects * depths, m] fp32: states at the last token of `_rows` of T templates."""
        blocks = self._blocks
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        for start in range(0, len(order), _ROWS):
            part = order[start : start + _ROWS]
            texts = [rows[i] for i in part]
            tokens = align_rows(texts, [len(text) - 1 for text in texts], self._pad_id, self._partial.device)
            _, kept = self._partial.run(tokens.columns(0), until=blocks[-1], outputs=blocks, places=tokens.places())
            # A model may stand on several devices.
            states = torch.stack([kept.outputs[block][:, tokens.lookup].float().cpu() for block in blocks], dim=1)
            for i, state in zip(part, states, strict=True):
                found[i] = state
        return torch.stack(found).unflatten(0, (-1, len(_SUBJECTS))).flatten(1, 2)


def _same(one: Wording, other: Wording) -> bool:
    """Whether `one`, which is to be read, asks what `other` does."""
    return not one.plain and (one.kind, one.relation) == (other.kind, other.relation)


def _words(text: str) -> set[str]:
    return {word[:_FEW_LETTERS] for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in _SMALL_WORDS}


def _all_ways(wordings: Sequence[Wording]) -> list[str]:
    """The texts in their order, but in turns one that does not open with the subject, one that does, and a question: a
    causal model reads the relation before the subject in the first and behind it in the second, and people ask."""
    kinds: list[list[str]] = [[], [], []]
    for wording in wordings:
        kinds[2 if wording.is_question else wording.text.startswith(SLOT)].append(wording.text)
    return [text for turn in zip_longest(*kinds) for text in turn if text is not None]


def _spread(wordings: Iterable[Wording], seed: str) -> list[str]:
    """The wordings' texts, one of each question before a second of any, in an order that only `seed` decides."""

    def draw(text: str) -> str:
        return hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()

    questions: dict[str, set[str]] = {}
    for wording in wordings:
        questions.setdefault(wording.relation, set()).add(wording.text)
    drawn = [sorted(questions[relation], key=draw) for relation in sorted(questions, key=draw)]
    return [text for turn in zip_longest(*drawn) for text in turn if text is not None]
