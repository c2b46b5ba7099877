"""An edit request, and its tokens.

`EditRequest` carries the field's names (EasyEdit, MEMIT). `tokenise` turns it into the rows that every later step
reads: one row per context (the bare prompt last) with prompt, target and lookup position, and the row of the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SLOT = "{}"


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: after `prompt` about `subject`, the model should say `target_new`.

    Args:
        prompt: text with `{}` where the subject goes, or with the literal subject inside.
        subject: the entity that the fact is about; its last token is the lookup position.
        target_new: the wished continuation; a leading space is added where it has none.
        ground_truth: the old continuation, for metrics only.
        case_id: the record's id in its data set, for reports only.

    Raises:
        TypeError: a text field is not a string.
        ValueError: a text field is empty, or the subject does not stand in the prompt.
    """

    prompt: str
    subject: str
    target_new: str
    ground_truth: str | None = None
    case_id: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"EditRequest.{name} must be a string, got {value!r}")
            if not value.strip():
                raise ValueError(f"EditRequest.{name} is empty: {value!r} (case {self.case_id})")
        if self.ground_truth is not None and not isinstance(self.ground_truth, str):
            raise TypeError(f"EditRequest.ground_truth must be a string or None, got {self.ground_truth!r}")
        slots = self.prompt.count(SLOT)
        if slots > 1:
            raise ValueError(f"EditRequest.prompt has {slots} slots {SLOT!r}, one is allowed: {self.prompt!r}")
        if slots == 0 and self.subject not in self.prompt:
            raise ValueError(f"EditRequest.subject {self.subject!r} does not stand in prompt {self.prompt!r}")

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_end(self) -> int:
        """Offset in `text` just past the subject (its last occurrence where the prompt has no slot)."""
        if SLOT in self.prompt:
            return self.prompt.index(SLOT) + len(self.subject.rstrip())
        return self.text.rindex(self.subject) + len(self.subject.rstrip())

    def tokenise(self, tokenizer: Any, contexts: Sequence[str]) -> TokenisedRequest:
        """Tokens of this request under each of `contexts` (editing/contexts.py), bare (last), and of its KL prompt."""
        rows = []
        for context in [*contexts, ""]:
            if SLOT in context:
                text, end = context.replace(SLOT, self.subject), context.index(SLOT) + len(self.subject.rstrip())
            else:
                prefix = f"{context}. " if context else ""
                text, end = prefix + self.text, len(prefix) + self.subject_end
            prompt, target = encode_prompt_target(tokenizer, text, self.target_new)
            rows.append(TokenRow(tuple(prompt), tuple(target), last_token_before(tokenizer, text, end)))
        essence = f"{self.subject} is a"
        ids = tuple(tokenizer(essence)["input_ids"])
        kl = TokenRow(ids, (), last_token_before(tokenizer, essence, len(self.subject.rstrip())))
        return TokenisedRequest(self, tuple(rows), kl)


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
    """

    request: EditRequest
    rows: tuple[TokenRow, ...]
    kl: TokenRow
    in_context_only: bool = False

    @property
    def bare(self) -> TokenRow:
        return self.rows[-1]

    @property
    def row_like_kl(self) -> int | None:
        """A row that begins as `kl` does up to the lookup position: a causal model predicts the same there."""
        begin = self.kl.prompt[: self.kl.lookup + 1]
        return next((i for i, row in enumerate(self.rows) if row.prompt[: row.lookup + 1] == begin), None)


def encode_prompt_target(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Token ids of `prompt` and of `target` as its continuation, with one space between.

    The two are tokenised together where the prompt's own ids begin the joint ids (then the target's ids are those that
    generation can produce), and apart where the tokenizer merges across the boundary.
    """
    continuation = target if target[:1].isspace() else " " + target
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    joint = list(tokenizer(prompt + continuation)["input_ids"])
    if joint[: len(prompt_ids)] == prompt_ids and len(joint) > len(prompt_ids):
        return prompt_ids, joint[len(prompt_ids) :]
    return prompt_ids, list(tokenizer(continuation, add_special_tokens=False)["input_ids"])


def last_token_before(tokenizer: Any, text: str, end: int) -> int:
    """Index of the token that holds character `end - 1` of `text`."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        holding = [i for i, (start, stop) in enumerate(offsets) if start < end <= stop]
        if holding:
            return holding[-1]
    # Slow tokenizers give no offsets: the tokens of the text up to `end` are the next best measure.
    return len(tokenizer(text[:end])["input_ids"]) - 1


def by_subject(batch: Sequence[TokenisedRequest]) -> list[list[int]]:
    """Places in the batch of the requests about one subject, subject by subject."""
    clusters: dict[str, list[int]] = {}
    for index, tokens in enumerate(batch):
        clusters.setdefault(" ".join(tokens.request.subject.split()).casefold(), []).append(index)
    return list(clusters.values())


def tokenise_batch(
    requests: Sequence[EditRequest], tokenizer: Any, contexts: Sequence[str], max_length: int | None
) -> list[TokenisedRequest]:
    """Checks a batch and tokenises it; nothing is changed before every request has passed.

    Raises:
        TypeError: requests is no sequence of EditRequest.
        ValueError: the batch is empty, two requests repeat or contradict each other, a target has no tokens, or a
            row is longer than the model's context (`max_length`).
    """
    if isinstance(requests, str) or not isinstance(requests, Sequence):
        raise TypeError(f"requests must be a list of EditRequest, got {type(requests).__name__}: {requests!r}")
    if len(requests) == 0:
        raise ValueError("requests is empty: a batch needs at least one EditRequest")
    seen: dict[str, tuple[int, str]] = {}
    for index, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise TypeError(f"requests[{index}] must be an EditRequest, got {type(request).__name__}: {request!r}")
        key, wish = " ".join(request.text.split()), request.target_new.strip()
        if key in seen:
            other, other_wish = seen[key]
            kind = "repeats" if wish == other_wish else f"contradicts (target {other_wish!r})"
            raise ValueError(f"requests[{index}] {kind} requests[{other}]: {request.text!r} -> {wish!r}")
        seen[key] = (index, wish)
    batch = [request.tokenise(tokenizer, contexts) for request in requests]
    for index, tokens in enumerate(batch):
        if not tokens.bare.target:
            raise ValueError(f"requests[{index}].target_new {tokens.request.target_new!r} has no tokens")
        longest = max(len(row.prompt) + len(row.target) for row in tokens.rows)
        if max_length is not None and longest > max_length:
            raise ValueError(
                f"requests[{index}].prompt takes {longest} tokens with its contexts and target, "
                f"the model's context is {max_length}: {tokens.request.text[:80]!r}..."
            )
    return batch
