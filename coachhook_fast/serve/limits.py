"""What one request may ask for, and how many may wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from coachhook_fast.serve.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; all of them positive.

    Attributes:
        body_bytes: of a request's body; header_seconds, body_seconds: until headers and body are there.
        connections: open at once; more are answered 503.
        new_tokens: of one answer; answers: of one request, prompts times `n`.
        batch_answers, batch_tokens: of one batch of answers, the latter with prompts and padding; workers: batches at
            once.
        generating, editing, rollbacks, inspecting: requests that may wait, each kind in a queue of its own.
        edits: of one batch; questions: of one preview.
        answer_seconds: that a batch of answers may take; drain_seconds: that what runs has to end after SIGTERM.

    Raises:
        ValueError: a bound is not positive.

    Limits(new_tokens=256).generating
    """

    body_bytes: int = 1 << 20
    header_seconds: float = 10.0
    body_seconds: float = 20.0
    connections: int = 512
    new_tokens: int = 1024
    answers: int = 16
    batch_answers: int = 16
    batch_tokens: int = 32_768
    workers: int = 2
    generating: int = 256
    editing: int = 16
    rollbacks: int = 16
    inspecting: int = 16
    edits: int = 64
    answer_seconds: float = 600.0
    questions: int = 32
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)!r}")
        if self.answers > self.batch_answers:
            raise ValueError(f"answers must be at most batch_answers={self.batch_answers}, got {self.answers}")


class Places:
    """Requests of one kind that wait or run; used on the event loop alone.

    places = Places("edits", 16)
    with places.one():
        ...
    """

    def __init__(self, kind: str, most: int) -> None:
        self.kind, self.most = kind, most
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """A place within the block. Raises ApiError 429 where all are taken."""
        if self.taken >= self.most:
            raise busy(self.kind)
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


def busy(kind: str) -> ApiError:
    """429: too many requests of this kind are waiting."""
    return ApiError(429, f"too many {kind} are waiting", code="busy", headers={"Retry-After": "1"})
