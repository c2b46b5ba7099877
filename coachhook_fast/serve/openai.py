"""/v1 as OpenAI's clients speak it: models, completions and chat, whole or streamed."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from coachhook_fast.serve.asking import Answers, Asking, Ids
from coachhook_fast.serve.errors import ApiError
from coachhook_fast.serve.rows import Piece, TokenLogprob
from coachhook_fast.serve.schemas import DEFAULT_TOKENS, ChatBody, CompletionBody, read
from coachhook_fast.serve.served import Served


def routes(asking: Asking, served: Served, began: int) -> APIRouter:
    """The routes under /v1; `began`: when the models are said to be made."""
    router = APIRouter(prefix="/v1")

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "coachhook"}

    @router.get("/models")
    async def models() -> Any:
        return {"object": "list", "data": [model(name) for name in served.names]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> Any:
        served.check_name(name)
        return model(name)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = read(CompletionBody, await request.body())
        served.check_name(body.model)
        prompts = await asking.completion_ids(body)
        sampling = asking.sampling(body, prompts, body.max_tokens, DEFAULT_TOKENS)
        answers = asking.start(body.model, prompts, sampling, body.n or 1)
        return await _answer(request, body, answers, _Completion(asking.tokenizer, body.model), prompts)

    @router.post("/chat/completions")
    async def chat(request: Request) -> Response:
        body = read(ChatBody, await request.body())
        served.check_name(body.model)
        prompts = await asking.chat_ids(body)
        sampling = asking.sampling(body, prompts, body.wanted, asking.limits.new_tokens)
        answers = asking.start(body.model, prompts, sampling, body.n or 1)
        return await _answer(request, body, answers, _Chat(asking.tokenizer, body.model), prompts)

    return router


async def _answer(
    request: Request, body: CompletionBody | ChatBody, answers: Answers, form: _Form, prompts: Sequence[Ids]
) -> Response:
    pieces = answers.pieces(request.receive)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(
            _events(pieces, answers, form, prompts, usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store"},
        )
    found: dict[int, list[Piece]] = {row.index: [] for row in answers.job.rows}
    async for piece in pieces:
        found[piece.index].append(piece)
    form.version = answers.job.version
    choices = [form.choice(index, some) for index, some in sorted(found.items())]
    return JSONResponse(form.head() | {"choices": choices, "usage": _usage(answers, prompts)})


async def _events(
    pieces: AsyncIterator[Piece], answers: Answers, form: _Form, prompts: Sequence[Ids], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the beginning of each answer, its pieces, the usage where asked for, and the end."""
    try:
        for row in answers.job.rows:
            if (first := form.first(row.index)) is not None:
                yield _event(form.head(chunk=True) | {"choices": [first]})
        async for piece in pieces:
            form.version = answers.job.version
            if piece.text or piece.finish or piece.logprobs:
                yield _event(form.head(chunk=True) | {"choices": [form.part(piece)]})
    except ApiError as error:  # the status is sent already: the stream says it
        yield _event(error.to_dict())
        return
    if usage:
        yield _event(form.head(chunk=True) | {"choices": [], "usage": _usage(answers, prompts)})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _usage(answers: Answers, prompts: Sequence[Ids]) -> dict[str, int]:
    asked, written = sum(map(len, prompts)), sum(len(row.tokens) for row in answers.job.rows)
    return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


class _Form(ABC):
    """The shape of an answer; `version` is the edits' that wrote it."""

    prefix: ClassVar[str]  # of its id
    kind: ClassVar[str]  # of an answer in one piece, and of a stream's chunks
    chunk_kind: ClassVar[str]

    def __init__(self, tokenizer: Any, model: str) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.version: str | None = None

    def head(self, *, chunk: bool = False) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.chunk_kind if chunk else self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None if self.version is None else f"coachhook-{self.version}",
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream says of an answer before its text."""
        return None

    @abstractmethod
    def part(self, piece: Piece) -> dict[str, Any]:
        """What a stream says of one piece of an answer."""

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole answer."""

    def _token(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


class _Completion(_Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def part(self, piece: Piece) -> dict[str, Any]:
        return self._choice(piece.index, piece.text, piece.logprobs, piece.finish)

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        return self._choice(index, _text(pieces), _logprobs(pieces), _finish(pieces))

    def _choice(self, index: int, text: str, found: Sequence[TokenLogprob], finish: str | None) -> dict[str, Any]:
        logprobs = None
        if found:
            tokens = [self._token(one.token) for one in found]
            logprobs = {
                "tokens": tokens,
                "token_logprobs": [one.logprob for one in found],
                "top_logprobs": [{self._token(token): value for token, value in reversed(one.top)} for one in found],
                "text_offset": [sum(map(len, tokens[:place])) for place in range(len(tokens))],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class _Chat(_Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish,
        }

    def choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        message = {"role": "assistant", "content": _text(pieces), "refusal": None}
        logprobs = self._logprobs(_logprobs(pieces))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(pieces)}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [
            {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]} for one in found
        ]
        return {"content": content, "refusal": None} if content else None


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _logprobs(pieces: Sequence[Piece]) -> list[TokenLogprob]:
    return [one for piece in pieces for one in piece.logprobs]


def _finish(pieces: Sequence[Piece]) -> str:
    if not pieces or pieces[-1].finish is None:  # its client has left: nobody reads this
        raise ApiError(503, "the answer was cut short", code="cut_short")
    return pieces[-1].finish
