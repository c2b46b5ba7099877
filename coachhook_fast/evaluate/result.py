"""The outcome of an evaluation, and its forms: JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Number = float | int | None


@dataclass
class RecordResult:
    """Scores of one record, each in 0..1 unless said; None where the record has no such prompt or answer.

    Attributes:
        index, case_id, subject: which record.
        reliability: token accuracy of the new answer after the edit prompt.
        generality: the same after the paraphrases, mean over them.
        locality: agreement with the base model at the neighbours' answers, mean over them.
        locality_unedited: the same over the neighbours that name no subject of the evaluated records.
        generation: 1 where the greedy continuation of the edit prompt is exactly the new answer, token by
            token.
        generation_rephrase: the same after the paraphrases, mean over them.
        efficacy: 1 where the new answer is more probable than the old one after the edit prompt.
        paraphrase: the same after the paraphrases, mean over them.
        neighbourhood: share of the neighbours to which their own answer is more probable than the edit's new
            one.
        fluency: weighted n-gram entropy in bits, of a text begun with the edit prompt.
        drift: KL(base ‖ edited) of the next token in nats, after texts about the subject that do not ask for the fact.
        completion: the greedy continuation of the edit prompt, as text.
    """

    index: int
    case_id: int | str | None
    subject: str
    reliability: Number = None
    generality: Number = None
    locality: Number = None
    locality_unedited: Number = None
    generation: Number = None
    generation_rephrase: Number = None
    efficacy: Number = None
    paraphrase: Number = None
    neighbourhood: Number = None
    fluency: Number = None
    drift: Number = None
    completion: str | None = None


# The averaged fields in their order of appearance.
AVERAGED = (
    "reliability", "generality", "locality", "locality_unedited", "generation", "generation_rephrase",
    "efficacy", "paraphrase", "neighbourhood", "fluency", "drift",
)  # fmt: skip


@dataclass
class Evaluation:
    """All records' results and what belongs to the model as a whole.

    Attributes:
        records: one entry a record.
        perplexity, base_perplexity: on the held-out text, of the model as it is and with the edits off; None
            unmeasured.
        seconds: wall time of the evaluation without the base's part.
        tasks: results of lm-eval tasks by name.
    """

    records: list[RecordResult]
    perplexity: float | None = None
    base_perplexity: float | None = None
    seconds: float = 0.0
    tasks: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Means over the records that have the value, and the composed scores; None where unmeasured.

        `harmonic_mean` is that of reliability, generality and locality; `rome_score` that of efficacy,
        paraphrase and neighbourhood; `perplexity_ratio` is edited over base.
        """
        means = {name: _mean([getattr(record, name) for record in self.records]) for name in AVERAGED}
        ratio = None
        if self.perplexity is not None and self.base_perplexity is not None:
            ratio = self.perplexity / self.base_perplexity
        return {
            **means,
            "harmonic_mean": harmonic_mean([means["reliability"], means["generality"], means["locality"]]),
            "rome_score": harmonic_mean([means["efficacy"], means["paraphrase"], means["neighbourhood"]]),
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity,
            "perplexity_ratio": ratio,
            "edits": len(self.records),
            "seconds": round(self.seconds, 3),
            **({"tasks": self.tasks} if self.tasks else {}),
        }

    def to_dict(self, *, details: bool = True) -> dict[str, Any]:
        """The summary, and with `details` the list `records`; only what JSON knows."""
        return {
            **self.summary(),
            **({"records": [asdict(record) for record in self.records]} if details else {}),
        }

    def to_json(self, *, details: bool = True) -> str:
        return json.dumps(self.to_dict(details=details), indent=1)

    def to_csv(self) -> str:
        """One line a record; empty cells where there is no value."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [one.name for one in fields(RecordResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.records)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table of the summary's measured numbers."""
        cells = {name: value for name, value in self.summary().items() if isinstance(value, (int, float))}
        head = "| " + " | ".join(cells) + " |"
        rule = "|" + "---|" * len(cells)
        return "\n".join([head, rule, "| " + " | ".join(map(format_number, cells.values())) + " |", ""])


def format_number(value: Number) -> str:
    """Three decimals, integers as they are, a dash for nothing."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def harmonic_mean(values: Sequence[Number]) -> float | None:
    """None where a value is missing, 0 where one is 0."""
    present = [value for value in values if value is not None]
    if not present or len(present) < len(values):
        return None
    return len(present) / sum(1 / value for value in present) if all(present) else 0.0


def _mean(values: Sequence[Number]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
