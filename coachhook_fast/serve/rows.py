"""One answer as it is written: its tokens, its text up to a stop string, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coachhook_fast.serve.errors import ApiError

_UNFINISHED = "\ufffd"  # what a decoder gives for the first bytes of a character
Emit = Callable[["Piece"], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the best token; top_p: the share of probability to draw from.
        max_tokens: at most; stop: strings before which the text ends; seed: of this answer's own generator.
        logprobs: how many alternatives of each token to report, None for none of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was written, its log-probability before temperature and top_p, and the best ones there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """News of an answer: text to add; at the end `finish` ("stop", "length") or `error`."""

    index: int
    text: str = ""
    finish: str | None = None
    error: ApiError | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(eq=False)
class Row:
    """An answer under way, in the thread that writes it.

    Attributes:
        index: number of the answer in its request; prompt: token ids; decode: ids to text.
        emit: takes each `Piece`; tokens: written so far; done: nothing more is written.
    """

    index: int
    prompt: Sequence[int]
    sampling: Sampling
    decode: Callable[[Sequence[int]], str]
    emit: Emit
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    _shown: tuple[int, int] = (0, 0)  # tokens before the last ones that were decoded, and up to them
    _held: str = ""  # text that may be the beginning of a stop string
    _logprobs: list[TokenLogprob] = field(default_factory=list)

    def push(self, token: int, ends: Sequence[int]) -> None:
        """One more token; `ends` are those that end a text."""
        if token in ends:
            self._logprobs = self._logprobs[: len(self._logprobs) - 1]  # it is no token of the text
            self._end("stop")
            return
        self.tokens.append(token)
        text, stopped = self._until_stop(self._held + self._decoded())
        if stopped:
            self._held = ""
            self._end("stop", text)
        elif len(self.tokens) >= self.sampling.max_tokens:
            self._held = text
            self._end("length")
        else:
            safe = len(text) - self._may_begin_stop(text)
            self._held = text[safe:]
            if safe or self._logprobs:
                self.emit(Piece(self.index, text[:safe], logprobs=self._taken_logprobs()))

    def note(self, logprob: TokenLogprob) -> None:
        """The log-probabilities of the token that `push` brings next."""
        self._logprobs.append(logprob)

    def fail(self, error: ApiError) -> None:
        """The answer ends with an error."""
        if not self.done:
            self.done = True
            self.emit(Piece(self.index, error=error))

    def cancel(self) -> None:
        """Nobody waits for it: it ends without a word."""
        self.done = True

    def _end(self, reason: str, text: str | None = None) -> None:
        if text is None:  # what was held back is no stop string after all, and a character may stay in pieces
            before, _ = self._shown
            rest = self.decode(self.tokens[before:])[len(self.decode(self.tokens[before : self._shown[1]])) :]
            text, stopped = self._until_stop(self._held + rest)
            reason = "stop" if stopped else reason
        self.done = True
        self.emit(Piece(self.index, text, finish=reason, logprobs=self._taken_logprobs()))

    def _decoded(self) -> str:
        """Text that the last tokens added; none while a character is incomplete. A few tokens before them are decoded
        again, for what a token says depends on those before it."""
        before, after = self._shown
        known = self.decode(self.tokens[before:after])
        text = self.decode(self.tokens[before:])
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._shown = (after, len(self.tokens))
        return text[len(known) :]

    def _until_stop(self, text: str) -> tuple[str, bool]:
        places = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self.sampling.stop), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.sampling.stop):
                return length
        return 0

    def _taken_logprobs(self) -> tuple[TokenLogprob, ...]:
        taken, self._logprobs = tuple(self._logprobs), []
        return taken
