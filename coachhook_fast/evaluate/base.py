"""What the unedited model says of the neighbours: computed once, kept in a file, used by every later run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coachhook_fast.evaluate.datasets import EditRecord
from coachhook_fast.evaluate.scoring import DEFAULT_BATCH_TOKENS, Ids, Pair, score_pairs
from coachhook_fast.models.loading import fingerprint
from coachhook_fast.models.placement import input_device
from coachhook_fast.request import encode_prompt_target

_VERSION = 1


@dataclass
class BaseAnswers:
    """The unedited model's answers.

    Attributes:
        model: key of the base model, see `model_key`.
        records: hash of the records, see `records_hash`.
        neighbours: for each record and neighbour, the most probable token at each position of the neighbour's
            answer; one position where the file gives no answer.
        perplexity: the base's perplexity by the hash of text and settings (`evaluate.metrics`).
    """

    model: str
    records: str
    neighbours: list[list[Ids]]
    perplexity: dict[str, float] = field(default_factory=dict)

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
        # Where no answer is given the model's next token is wanted: any one-token target reads it.
        pairs = [
            Pair(tuple(prompt_ids), tuple(answer_ids[:1] if answer is None else answer_ids))
            for record in records
            for prompt, answer in zip(record.locality_prompts, record.locality_answers, strict=True)
            for prompt_ids, answer_ids in [encode_prompt_target(tokenizer, prompt, answer or "the")]
        ]
        with unedited(model):
            scores = score_pairs(model, pairs, batch_tokens=batch_tokens, progress=progress, description="base answers")
        predictions = iter([score.predictions for score in scores])
        neighbours = [[next(predictions) for _ in record.locality_prompts] for record in records]
        return cls(model_key(model), records_hash(records), neighbours)

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
        part.write_text(json.dumps({"version": _VERSION, **asdict(self)}))
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BaseAnswers:
        """Raises ValueError where the file is not one of ours."""
        try:
            values = json.loads(Path(path).read_text())
            version = values.pop("version")
            if version != _VERSION:
                raise ValueError(f"version {version}, this package reads {_VERSION}")
            values["neighbours"] = [[tuple(ids) for ids in record] for record in values["neighbours"]]
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
