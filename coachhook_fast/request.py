"""An edit request, and its tokens.

`EditRequest` carries the field's names (EasyEdit, MEMIT). `tokenise` turns it into the rows that every later step
reads: one row per context (the bare prompt last) with prompt, target and lookup position, and the row of the KL term.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from coachhook_fast.chat import answer_bounds

SLOT = "{}"


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: after `prompt` about `subject`, the model should say `target_new`.

    Args:
        prompt: text with `{}` where the subject goes, or with the literal subject inside.
        subject: the entity that the fact is about; its last token is the lookup position.
        target_new: the wished continuation; a leading space is added where it has none.
        ground_truth: the old continuation, for metrics only.
        paraphrases: other wordings of the question, written as `prompt` is, that must give `target_new` too.
        keep: texts about the subject, written as `prompt` is, whose continuation must stay as it was.
        case_id: the record's id in its data set, for reports only.

    Raises:
        TypeError: a text field is not a string, or paraphrases or keep is no list of strings.
        ValueError: a text field is empty, the subject does not stand in a prompt, or a prompt is to change and to keep.
    """

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    case_id: int | str | None = None
    paraphrases: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"EditRequest.{name} must be a string, got {value!r}")
            if _blank(value):
                raise ValueError(f"EditRequest.{name} is empty: {value!r} (case {self.case_id})")
        if self.ground_truth is not None and not isinstance(self.ground_truth, str):
            raise TypeError(f"EditRequest.ground_truth must be a string or None, got {self.ground_truth!r}")
        if isinstance(self.case_id, bool) or not isinstance(self.case_id, (int, str, type(None))):
            raise TypeError(f"EditRequest.case_id must be an integer, a string or None, got {self.case_id!r}")
        for name in ("paraphrases", "keep"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, (list, tuple)):
                raise TypeError(f"EditRequest.{name} must be a list of strings, got {value!r}")
            if not all(isinstance(text, str) for text in value):
                raise TypeError(f"EditRequest.{name} must hold strings, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # lists come from JSON
        named = [("prompt", self.prompt)]
        named += [(f"paraphrases[{index}]", text) for index, text in enumerate(self.paraphrases)]
        named += [(f"keep[{index}]", text) for index, text in enumerate(self.keep)]
        for name, text in [*named, ("subject", self.subject), ("target_new", self.target_new)]:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"EditRequest.{name} holds half a character (a lone surrogate): {text!r}")
        for name, text in named:
            self._check_prompt(name, text)
        both = {filled(text, self.subject) for text in (self.prompt, *self.paraphrases)}
        both &= {filled(text, self.subject) for text in self.keep}
        if both:
            raise ValueError(f"EditRequest.keep holds what is to change: {sorted(both)}")

    def _check_prompt(self, name: str, text: str) -> None:
        if _blank(text):
            raise ValueError(f"EditRequest.{name} is empty: {text!r} (case {self.case_id})")
        slots = text.count(SLOT)
        if slots > 1:
            raise ValueError(f"EditRequest.{name} has {slots} slots {SLOT!r}, one is allowed: {text!r}")
        if slots == 0 and self.subject not in text:
            raise ValueError(f"EditRequest.subject {self.subject!r} does not stand in {name} {text!r}")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return filled(self.prompt, self.subject)

    @property
    def subject_end(self) -> int:
        """Offset in `text` just past the subject (its last occurrence where the prompt has no slot)."""
        return _subject_start(self.prompt, self.subject) + len(self.subject.rstrip())

    @property
    def template(self) -> str:
        """The prompt with a slot where the subject stands."""
        return slotted(self.prompt, self.subject)

    def tokenise(
        self,
        tokenizer: Any,
        contexts: Sequence[str],
        *,
        paraphrases: Sequence[str] = (),
        keep: Sequence[str] = (),
        earlier: Sequence[EditRequest] = (),
    ) -> TokenisedRequest:
        """Tokens of this request under each of `contexts` (see editing/contexts.py), bare (last row), and of its KL
        prompt; with wordings that the editor found (`editing/targets/wordings.py`) behind the request's own, and the
        `earlier` facts about its subject."""
        rows = []
        for context in [*contexts, ""]:
            if SLOT in context:
                rows.append(prompt_row(tokenizer, context, self.subject, self.target_new))
            else:
                rows.append(prompt_row(tokenizer, self.prompt, self.subject, self.target_new, before=context))
        prefix = next((context for context in contexts if SLOT not in context), "")

        def row(prompt: str, subject: str, target: str | None = None) -> TokenRow:
            bare = prompt_row(tokenizer, prompt, subject, target)
            return bare if bare.lookup else prompt_row(tokenizer, prompt, subject, target, before=prefix)

        others = [row(text, self.subject, self.target_new) for text in (*self.paraphrases, *paraphrases)]
        kept = [row(text, self.subject) for text in (*self.keep, *keep)]
        facts = [row(fact.prompt, fact.subject, fact.target_new) for fact in earlier]
        return TokenisedRequest(
            self,
            tuple(rows),
            prompt_row(tokenizer, f"{SLOT} is a", self.subject),
            paraphrases=tuple(found for found in others if found.lookup),
            keep=tuple(found for found in kept if found.lookup),
            held=tuple(found for found in facts if found.lookup),
        )


def filled(prompt: str, subject: str) -> str:
    """`prompt` with the subject in its slot, where it has one."""
    return prompt.replace(SLOT, subject)


def slotted(prompt: str, subject: str) -> str:
    """`prompt` with a slot where the subject stands."""
    if SLOT in prompt:
        return prompt
    start = _subject_start(prompt, subject)
    return prompt[:start] + SLOT + prompt[start + len(subject) :]


def _subject_start(prompt: str, subject: str) -> int:
    return prompt.index(SLOT) if SLOT in prompt else prompt.rindex(subject)


def prompt_row(tokenizer: Any, prompt: str, subject: str, target: str | None = None, *, before: str = "") -> TokenRow:
    """Tokens of one prompt about `subject` (in its slot, else the last time it stands there), behind `before`.

    Where the prompt is a chat's up to where the answer begins, the template's end of an answer belongs to the target:
    without it a model that was taught the target says it over and over.
    """
    if target is not None:
        before_answer, behind_answer = answer_bounds(tokenizer) or ("", "")
        target += behind_answer if before_answer and prompt.endswith(before_answer) else ""
    start = _subject_start(prompt, subject)
    prefix = f"{before}. " if before else ""
    text, end = prefix + filled(prompt, subject), len(prefix) + start + len(subject.rstrip())
    ids, answer = (prompt_ids(tokenizer, text), []) if target is None else encode_prompt_target(tokenizer, text, target)
    return TokenRow(tuple(ids), tuple(answer), last_token_before(tokenizer, text, end))


@dataclass(frozen=True)
class TokenRow:
    """One text of a request: prompt ids, target ids, and the index of the subject's last token in the prompt."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    lookup: int


@dataclass(frozen=True)
class TokenisedRequest:
    """A request's rows: one a context, the bare prompt last; `kl` is "{subject} is a".

    Where `in_context_only`, the bare prompt cannot be edited and another row stands in its place (editing/sinks.py).

    Attributes:
        paraphrases: further prompts with the target; keep: prompts whose continuation must stay; held: prompts and
            targets of earlier facts about the subject. Where the subject would stand on the first token
            of the text, at which a model without BOS cannot tell subjects apart, a context stands before it.
    """

    request: EditRequest
    rows: tuple[TokenRow, ...]
    kl: TokenRow
    in_context_only: bool = False
    paraphrases: tuple[TokenRow, ...] = ()
    keep: tuple[TokenRow, ...] = ()
    held: tuple[TokenRow, ...] = ()

    @property
    def asking(self) -> tuple[TokenRow, ...]:
        """All rows that have the target behind them."""
        return (*self.rows, *self.paraphrases)

    @property
    def bare(self) -> TokenRow:
        return self.rows[-1]

    @property
    def row_like_kl(self) -> int | None:
        """A row that begins as `kl` does up to the lookup position: a causal model predicts the same there."""
        begin = self.kl.prompt[: self.kl.lookup + 1]
        return next((i for i, row in enumerate(self.rows) if row.prompt[: row.lookup + 1] == begin), None)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on: without the end-of-text tokens that some tokenizers put behind every text
    (`add_eos_token`), after which a model begins another one."""
    ids = list(tokenizer(text)["input_ids"])
    end, written = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "eos_token", None)
    own = 0  # those that are written in the text itself
    while written and text.endswith(written * (own + 1)):
        own += 1
    last = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != end), 0)
    return ids[: last + own]


def encode_prompt_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of `prompt` and of `target` as its continuation, with one space between; none behind a line break, as
    chat templates end.

    The two are tokenised together where the prompt's own ids begin the joint ids (then the target's ids are those that
    generation can produce), and apart where the tokenizer merges across the boundary.
    """
    continuation = target if target[:1].isspace() or prompt.endswith("\n") else " " + target
    ids, joint = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + continuation)
    if joint[: len(ids)] == ids and len(joint) > len(ids):
        return ids, joint[len(ids) :]
    return ids, list(tokenizer(continuation, add_special_tokens=False)["input_ids"])


def last_token_before(tokenizer: Any, text: str, end: int) -> int:
    """Index of the token that holds character `end - 1` of `text`."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        holding = [i for i, (start, stop) in enumerate(offsets) if start < end <= stop]
        if holding:
            return holding[-1]
    # Slow tokenizers give no offsets: the tokens of the text up to `end` are the next best measure.
    return len(prompt_ids(tokenizer, text[:end])) - 1


def fact_keys(request: EditRequest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the fact of a request is known by: its prompt, and its subject with the template around it. Two requests
    that share one of them are about the same fact, whatever their targets."""
    return (_words(request.text),), (subject_key(request.subject), _words(request.template))


def asks_the_same(one: EditRequest, other: EditRequest) -> bool:
    """Whether two requests about the same fact want the same: target, paraphrases and prompts to keep."""
    return one.target_new.strip() == other.target_new.strip() and all(
        sorted(_words(slotted(text, one.subject)) for text in getattr(one, name))
        == sorted(_words(slotted(text, other.subject)) for text in getattr(other, name))
        for name in ("paraphrases", "keep")
    )


def _blank(text: str) -> bool:
    """Whether nothing of it is seen: spaces, controls and characters without width alone."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def _words(text: str) -> str:
    return " ".join(text.split())


def _standing(request: EditRequest, batch: Sequence[EditRequest], earlier: Sequence[EditRequest]) -> list[EditRequest]:
    """Those of `earlier` that are about the request's subject and that nothing in the batch asks anew. Requests of one
    subject share their δ: the first holds for all."""
    subject = subject_key(request.subject)
    mates = [other for other in batch if subject_key(other.subject) == subject]
    if mates[0] is not request:
        return []
    standing: dict[str, EditRequest] = {}
    for fact in earlier:
        if subject_key(fact.subject) == subject:
            standing[_words(fact.template)] = fact  # the latest of one question
    for other in mates:
        for prompt in (other.prompt, *other.paraphrases):
            standing.pop(_words(slotted(prompt, other.subject)), None)
    return list(standing.values())


def subject_key(subject: str) -> str:
    """What subjects are told apart by."""
    return _words(subject).casefold()


def by_subject(batch: Sequence[TokenisedRequest]) -> list[list[int]]:
    """Places in the batch of the requests about one subject, subject by subject."""
    clusters: dict[str, list[int]] = {}
    for index, tokens in enumerate(batch):
        clusters.setdefault(subject_key(tokens.request.subject), []).append(index)
    return list(clusters.values())


def check_batch(requests: Sequence[EditRequest]) -> None:
    """Checks what can be told without a tokenizer.

    Raises:
        TypeError: requests is no sequence of EditRequest.
        ValueError: the batch is empty, or two requests repeat or contradict each other.
    """
    if isinstance(requests, str) or not isinstance(requests, Sequence):
        raise TypeError(f"requests must be a list of EditRequest, got {type(requests).__name__}: {requests!r}")
    if len(requests) == 0:
        raise ValueError("requests is empty: a batch needs at least one EditRequest")
    seen: dict[str, tuple[int, str]] = {}
    for index, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise TypeError(f"requests[{index}] must be an EditRequest, got {type(request).__name__}: {request!r}")
        key, wish = _words(request.text), request.target_new.strip()
        if key in seen:
            other, other_wish = seen[key]
            kind = "repeats" if wish == other_wish else f"contradicts (target {other_wish!r})"
            raise ValueError(f"requests[{index}] {kind} requests[{other}]: {request.text!r} -> {wish!r}")
        seen[key] = (index, wish)


def tokenise_batch(
    requests: Sequence[EditRequest],
    tokenizer: Any,
    contexts: Sequence[str],
    max_length: int | None,
    *,
    wordings: Callable[[Sequence[EditRequest]], list[tuple[tuple[str, ...], tuple[str, ...]]]] | None = None,
    earlier: Sequence[EditRequest] = (),
) -> list[TokenisedRequest]:
    """Checks a batch and tokenises it; nothing is changed before every request has passed.

    Args:
        wordings: paraphrases and prompts to keep that are found for each request.
        earlier: facts that are edited already, oldest first; those about a request's subject are held, less those that
            it asks anew.

    Raises:
        TypeError, ValueError: see `check_batch`.
        ValueError: a target has no tokens, or a row is longer than the model's context (`max_length`).
    """
    check_batch(requests)
    found = [((), ())] * len(requests) if wordings is None else wordings(requests)
    batch = [
        request.tokenise(
            tokenizer, contexts, paraphrases=paraphrases, keep=keep, earlier=_standing(request, requests, earlier)
        )
        for request, (paraphrases, keep) in zip(requests, found, strict=True)
    ]
    for index, tokens in enumerate(batch):
        if not tokens.bare.target:
            raise ValueError(f"requests[{index}].target_new {tokens.request.target_new!r} has no tokens")
        for name, rows in (
            ("prompt", tokens.rows), ("paraphrases", tokens.paraphrases), ("keep", tokens.keep),
            ("subject has earlier facts one of which", tokens.held),
        ):  # fmt: skip
            longest = max((len(row.prompt) + len(row.target) for row in rows), default=0)
            if max_length is not None and longest > max_length:
                raise ValueError(
                    f"requests[{index}].{name} takes {longest} tokens with context and target, "
                    f"the model's context is {max_length}: {tokens.request.text[:80]!r}..."
                )
    return batch
