"""An edit and the prompts that judge it.

Prompts that ask for the edited fact and prompts that ask something else about its subject are fields of their own: a
good edit answers the first with the new answer and the second as before, so a mean over both says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from coachhook_fast.request import EditRequest

FORMS = ("cloze", "question")


class Fact(NamedTuple):
    """Another fact of the edited subject, which the edit must leave alone."""

    prompt: str
    answer: str
    relation: str | None = None


class Consequence(NamedTuple):
    """What follows from the edited fact: a prompt whose answer should have moved with it."""

    prompt: str
    answer: str
    kind: str | None = None


@dataclass(frozen=True)
class EditRecord:
    """One edit and the prompts that judge it.

    Attributes:
        request: the edit.
        rephrase_prompts: what the file calls rephrase prompts, whatever they ask; generality is taken over them.
        locality_prompts: neighbours, whose answers must stay as they were.
        locality_answers: what follows each neighbour; None where the file does not say.
        rephrase_kinds, locality_kinds: a kind (or None) for each of those prompts; empty where the file has none.
        paraphrases: other wordings of the edit prompt, which must give `request.target_new` too.
        same_subject: other facts of the subject, none of which follows from the edited one.
        portability: what follows from the edit.
        form: "cloze" or "question", the form of the edit prompt; None where nobody said.
        relation: the edited fact's relation, a Wikidata id where it has one.

    Raises:
        ValueError: prompts differ in number from their answers or kinds, a prompt or an answer is empty, or the form
            is unknown.
    """

    request: EditRequest
    rephrase_prompts: tuple[str, ...] = ()
    locality_prompts: tuple[str, ...] = ()
    locality_answers: tuple[str | None, ...] = ()
    rephrase_kinds: tuple[str | None, ...] = ()
    locality_kinds: tuple[str | None, ...] = ()
    paraphrases: tuple[str, ...] = ()
    same_subject: tuple[Fact, ...] = ()
    portability: tuple[Consequence, ...] = ()
    form: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.locality_prompts) != len(self.locality_answers):
            raise ValueError(
                f"locality_answers must have one entry (or null) a prompt: {len(self.locality_prompts)} "
                f"locality_prompts, got {len(self.locality_answers)}"
            )
        for name, prompts in (("rephrase", self.rephrase_prompts), ("locality", self.locality_prompts)):
            kinds = getattr(self, f"{name}_kinds")
            if kinds and len(kinds) != len(prompts):
                raise ValueError(
                    f"{name}_kinds must have one entry (or null) a prompt, or none at all: {len(prompts)} "
                    f"{name}_prompts, got {len(kinds)}"
                )
        for name in ("rephrase_prompts", "locality_prompts", "paraphrases"):
            for text in getattr(self, name):
                if not text.strip():
                    raise ValueError(f"{name} holds an empty prompt: {getattr(self, name)!r}")
        facts: tuple[Fact | Consequence, ...] = (*self.same_subject, *self.portability)
        for fact in facts:
            if not fact.prompt.strip() or not fact.answer.strip():
                name = "same_subject" if isinstance(fact, Fact) else "portability"
                raise ValueError(f"{name} holds an empty prompt or answer: {fact!r}")
        if self.form not in (None, *FORMS):
            raise ValueError(f"form must be one of {FORMS} or None, got {self.form!r}")


def distinct_paraphrases(prompt: str, *groups: tuple[str, ...]) -> tuple[str, ...]:
    """The groups' texts in order, each once, without the edit prompt itself: asked again it would count twice."""
    return tuple(text for text in dict.fromkeys(text for group in groups for text in group) if text != prompt)
