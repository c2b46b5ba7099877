"""What the unedited model says: computed once, kept in a file, used by every later run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from coachhook_fast.evaluate.generation import continue_greedily
from coachhook_fast.evaluate.record import EditRecord
from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, Ids, Pair, encode_pair, score_distinct
from coachhook_fast.models.loading import fingerprint
from coachhook_fast.models.placement import input_device
from coachhook_fast.request import encode_prompt_target

_VERSION = 2  # 1 had the neighbours only

Written = tuple[int, Ids]  # tokens asked for, tokens written: fewer where the model ended the text


@dataclass
class BaseAnswers:
    """The unedited model's answers.

    Attributes:
        model: key of the base model, see `model_key`.
        records: hash of the records, see `records_hash`.
        neighbours: for each record and neighbour, the most probable token at each position of the neighbour's
            answer; one position where the file gives no answer.
        same_subject: the same for each record's other facts of its subject.
        first_tokens: for each record, the most probable next token after the edit prompt and then each paraphrase.
        perplexity: the base's perplexity by the hash of text and settings (`evaluate.metrics`).
        written: greedy continuations by the prompt's tokens, of those prompts that `write` was asked for.
    """

    model: str
    records: str
    neighbours: list[list[Ids]]
    same_subject: list[list[Ids]]
    first_tokens: list[Ids]
    perplexity: dict[str, float] = field(default_factory=dict)
    written: dict[Ids, Written] = field(default_factory=dict)

    @classmethod
    def collect(
        cls,
        model: Any,
        tokenizer: Any,
        records: Sequence[EditRecord],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        progress: bool = False,
    ) -> BaseAnswers:
        """Asks the model with all hooks off; they are as before afterwards."""

        def next_token(prompt: str) -> Pair:
            """Where no answer is given the model's next token is wanted: any one-token target reads it."""
            prompt_ids, target_ids = encode_prompt_target(tokenizer, prompt, "the")
            return Pair(tuple(prompt_ids), tuple(target_ids[:1]))

        neighbours = [
            [
                next_token(prompt) if answer is None else encode_pair(tokenizer, prompt, answer)
                for prompt, answer in zip(record.locality_prompts, record.locality_answers, strict=True)
            ]
            for record in records
        ]
        facts = [[encode_pair(tokenizer, fact.prompt, fact.answer) for fact in one.same_subject] for one in records]
        wordings = [[next_token(prompt) for prompt in (one.request.text, *one.paraphrases)] for one in records]
        with unedited(model):
            scores = score_distinct(
                model,
                [pair for groups in (neighbours, facts, wordings) for group in groups for pair in group],
                batch_tokens=batch_tokens,
                progress=progress,
                description="base answers",
            )

        def predicted(groups: list[list[Pair]]) -> list[list[Ids]]:
            return [[scores[pair].predictions for pair in group] for group in groups]

        first = [tuple(ids[0] for ids in group) for group in predicted(wordings)]
        return cls(model_key(model), records_hash(records), predicted(neighbours), predicted(facts), first)

    def write(self, model: Any, lengths: Mapping[Ids, int], **options: Any) -> dict[Ids, Ids]:
        """Greedy continuations of the unedited model, `lengths` by prompt; those that are not kept yet are asked for.

        `options` are `continue_greedily`'s.
        """
        missing = [ids for ids, length in lengths.items() if ids not in self.written or self.written[ids][0] < length]
        if missing:
            with unedited(model):
                found = continue_greedily(
                    model, missing, [lengths[ids] for ids in missing], description="base texts", **options
                )
            self.written |= {ids: (lengths[ids], row) for ids, row in zip(missing, found, strict=True)}
        return {ids: self.written[ids][1][:length] for ids, length in lengths.items()}

    def check(self, model: Any, records: Sequence[EditRecord]) -> None:
        """Raises ValueError where these are the answers of another model or to other records."""
        for name, ours, theirs in (
            ("model", self.model, model_key(model)),
            ("records", self.records, records_hash(records)),
        ):
            if ours != theirs:
                raise ValueError(f"base answers belong to other {name}: theirs have hash {ours}, these {theirs}")

    def save(self, path: str | Path) -> None:
        """Writes JSON; a reader never sees half a file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["written"] = [[ids, *entry] for ids, entry in self.written.items()]
        part.write_text(json.dumps({"version": _VERSION, **values}))
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BaseAnswers:
        """Raises ValueError where the file is not one of ours."""
        try:
            values = json.loads(Path(path).read_text())
            version = values.pop("version")
            if version != _VERSION:
                raise ValueError(f"version {version}, this package reads {_VERSION}; delete it, and it is made anew")
            for name in ("neighbours", "same_subject"):
                values[name] = [[tuple(ids) for ids in record] for record in values[name]]
            values["first_tokens"] = [tuple(ids) for ids in values["first_tokens"]]
            values["written"] = {tuple(ids): (length, tuple(row)) for ids, length, row in values["written"]}
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold base answers: {error}") from error


def model_key(model: Any) -> str:
    """The base model's fingerprint, dtype and kind of device: near ties fall differently in another arithmetic."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{fingerprint(model)}-{dtype}-{input_device(model).type}"


def records_hash(records: Sequence[EditRecord]) -> str:
    """Hash of the records' contents in order, 16 hex digits."""
    text = json.dumps([asdict(record) for record in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def unedited(model: Any) -> Iterator[None]:
    """The base model within, whether hooks are installed or not."""
    handle = getattr(model, "coachhook", None)
    if handle is None:
        yield
        return
    with handle.disabled():
        yield
