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
        paraphrase: the same after the true paraphrases, mean over them.
        paraphrase_same_question: the same over those paraphrases whose first token of an answer is, to the unedited
            model, that after the edit prompt.
        same_subject: agreement with the base model at the answers of other facts of the subject.
        leak: share of the prompts of those facts whose text names the new answer where the unedited model's does not.
        leak_passing: the same share of texts that mention the subject in passing.
        portability: token accuracy of what follows from the edit.
        repeats: mentions of the new answer in the text after the edit prompt, but for the first and for as many as the
            unedited model writes; a count, 0 or more.
        said: 1 where the text after the edit prompt names the new answer.
        said_paraphrase, said_question, said_chat: the same after the paraphrases, after the fact as a question, and in
            the assistant's answer.
        generality: token accuracy after what the file calls rephrase prompts, mean over them.
        locality: agreement with the base model at the neighbours' answers, mean over them.
        locality_unedited: the same over the neighbours that name no subject of the evaluated records.
        generation: 1 where the greedy continuation of the edit prompt is exactly the new answer, token by
            token.
        generation_rephrase: the same after the rephrase prompts, mean over them.
        efficacy: 1 where the new answer is more probable than the old one after the edit prompt.
        rome_paraphrase: the same after the rephrase prompts, mean over them.
        neighbourhood: share of the neighbours to which their own answer is more probable than the edit's new
            one.
        fluency: weighted n-gram entropy in bits, of a text begun with the edit prompt.
        drift: KL(base ‖ edited) of the next token in nats, after texts about the subject that do not ask for the fact.
        completion: the greedy continuation of the edit prompt, in as many tokens as the new answer has.
        written: the longest text that was written after the edit prompt.
        kinds: "metric/kind" for the rephrase prompts, neighbours and portability prompts that have a kind.
    """

    index: int
    case_id: int | str | None
    subject: str
    reliability: Number = None
    paraphrase: Number = None
    paraphrase_same_question: Number = None
    same_subject: Number = None
    leak: Number = None
    leak_passing: Number = None
    locality: Number = None
    locality_unedited: Number = None
    portability: Number = None
    repeats: Number = None
    said: Number = None
    said_paraphrase: Number = None
    said_question: Number = None
    said_chat: Number = None
    generality: Number = None
    generation: Number = None
    generation_rephrase: Number = None
    efficacy: Number = None
    rome_paraphrase: Number = None
    neighbourhood: Number = None
    fluency: Number = None
    drift: Number = None
    completion: str | None = None
    written: str | None = None
    kinds: dict[str, float] = field(default_factory=dict)


# The averaged fields in their order of appearance.
AVERAGED = (
    "reliability", "paraphrase", "paraphrase_same_question", "same_subject", "leak", "leak_passing",
    "locality", "locality_unedited", "portability", "repeats", "said", "said_paraphrase", "said_question", "said_chat",
    "generality", "generation", "generation_rephrase", "efficacy", "rome_paraphrase", "neighbourhood",
    "fluency", "drift",
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

        `fact_score` is the harmonic mean of reliability, paraphrase, same_subject, 1 - leak and locality;
        `harmonic_mean` that of reliability, generality and locality; `rome_score` that of efficacy,
        rome_paraphrase and neighbourhood; `perplexity_ratio` is edited over base; `kinds` has the means by kind.
        """
        means = {name: mean([getattr(record, name) for record in self.records]) for name in AVERAGED}
        ratio = None
        if self.perplexity is not None and self.base_perplexity is not None:
            ratio = self.perplexity / self.base_perplexity
        quiet = None if means["leak"] is None else 1 - means["leak"]
        alone = [means[name] for name in ("reliability", "paraphrase", "same_subject", "locality")]
        return {
            "fact_score": harmonic_mean([*alone, quiet]),
            **means,
            "harmonic_mean": harmonic_mean([means["reliability"], means["generality"], means["locality"]]),
            "rome_score": harmonic_mean([means["efficacy"], means["rome_paraphrase"], means["neighbourhood"]]),
            "perplexity": self.perplexity,
            "base_perplexity": self.base_perplexity,
            "perplexity_ratio": ratio,
            "edits": len(self.records),
            "seconds": round(self.seconds, 3),
            **({"kinds": self.kinds()} if self.kinds() else {}),
            **({"tasks": self.tasks} if self.tasks else {}),
        }

    def kinds(self) -> dict[str, float]:
        """Mean of each "metric/kind" over the records that have it, in alphabetical order."""
        values: dict[str, list[float]] = {}
        for record in self.records:
            for name, value in record.kinds.items():
                values.setdefault(name, []).append(value)
        return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}

    def to_dict(self, *, details: bool = True) -> dict[str, Any]:
        """The summary, and with `details` the list `records`; only what JSON knows."""
        return {
            **self.summary(),
            **({"records": [asdict(record) for record in self.records]} if details else {}),
        }

    def to_json(self, *, details: bool = True) -> str:
        return json.dumps(self.to_dict(details=details), indent=1)

    def to_csv(self) -> str:
        """One line a record, a column a kind at the end; empty cells where there is no value."""
        text = io.StringIO()
        names = [one.name for one in fields(RecordResult) if one.name != "kinds"]
        writer = csv.DictWriter(text, [*names, *self.kinds()], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) | record.kinds for record in self.records)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table of the summary's measured numbers, and one of the means by kind where there are any."""
        tables = [self._table()]
        if self.kinds():
            rows = [f"| {name} | {format_number(value)} |" for name, value in self.kinds().items()]
            tables.append("\n".join(["| kind | mean |", "|---|---|", *rows, ""]))
        return "\n".join(tables)

    def _table(self) -> str:
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


def mean(values: Sequence[Number]) -> float | None:
    """Of the values that are there; None without one."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def means_by_kind(metric: str, kinds: Sequence[str | None], values: Sequence[float]) -> dict[str, float]:
    """Mean of `values` for each "metric/kind"; empty where nobody said a kind (`kinds` may be empty)."""
    groups: dict[str, list[float]] = {}
    for kind, value in zip(kinds, values, strict=False):
        if kind is not None:
            groups.setdefault(f"{metric}/{kind}", []).append(value)
    return {name: sum(group) / len(group) for name, group in groups.items()}
