"""Around every request: who may enter, a body that fits and arrives in time, one log line, and no traceback outside."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from coachhook_fast.serve.auth import Doorkeeper, Headers
from coachhook_fast.serve.errors import FAILED, ApiError
from coachhook_fast.serve.limits import Limits
from coachhook_fast.serve.logs import log, log_error
from coachhook_fast.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Open to all: they say nothing of the model or of its edits.
OPEN = frozenset({"/", "/page.css", "/page.js", "/healthz", "/readyz"})


class Guard:
    """An ASGI app around another. What it lets in has passed the doorkeeper, by its headers, before a byte of its body
    was asked for; the body is counted as it comes, whatever Content-Length says.
    """

    def __init__(self, app: App, doorkeeper: Doorkeeper, limits: Limits, metrics: Metrics) -> None:
        self.app, self.doorkeeper, self.limits, self.metrics = app, doorkeeper, limits, metrics

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, answer, request_id = time.perf_counter(), _Answer(send), uuid.uuid4().hex[:12]
        try:
            content = await self._admit(scope, receive)
            await self.app(scope, _given(content, receive), answer.send)
        except ApiError as error:
            await answer.refuse(error)
        except _ClientLeftError:
            pass
        except Exception as error:
            log_error("request_failed", error, id=request_id)
            if answer.status is None:
                await answer.refuse(ApiError(500, FAILED, code="internal"))
            elif not answer.complete:
                raise  # the server closes the connection
        finally:
            self._note(scope, answer.status or 499, time.perf_counter() - began, request_id)

    async def _admit(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        """The request's body. ApiError where it may not enter."""
        headers: Headers = scope["headers"]
        is_open = scope["path"] in OPEN
        refused = None if is_open else self.doorkeeper.refusal(headers)
        if refused is not None:
            status, message = refused
            raise ApiError(status, message, headers={"WWW-Authenticate": "Bearer"} if status == 401 else None)
        most = 0 if is_open else self.limits.body_bytes
        check_length(headers, most)
        try:
            content = await asyncio.wait_for(_read(receive, most), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {self.limits.body_seconds:g} s") from None
        kind = _first(headers, b"content-type").partition(b";")[0].strip().lower()
        if content and kind != b"application/json":
            raise ApiError(415, "the body must be of Content-Type application/json")
        return content

    def _note(self, scope: MutableMapping[str, Any], status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.add("coachhook_requests_total", route=route, status=str(status))
        self.metrics.add("coachhook_request_seconds_sum", seconds, route=route)
        self.metrics.add("coachhook_request_seconds_count", route=route)
        log("request", id=request_id, method=scope["method"], route=route, status=status, seconds=round(seconds, 4))


def check_length(headers: Headers, most: int) -> None:
    """ApiError where the headers announce a body of more than `most` bytes, or its length in two ways."""
    lengths = [value for name, value in headers if name == b"content-length"]
    if lengths and any(name == b"transfer-encoding" for name, _ in headers):
        raise ApiError(400, "Content-Length beside Transfer-Encoding: give the one or the other")
    for length in lengths:
        if not length.isdigit() or len(length) > 18:
            raise ApiError(400, "Content-Length is no number")
        if int(length) > most:
            raise _too_large(most)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body may have {most} bytes", code="too_large")


async def _read(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientLeftError
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _given(content: bytes, receive: Receive) -> Receive:
    """A `receive` that brings `content` first, and then what the server says: that the client has left."""
    waiting = [content]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay


def _first(headers: Headers, wanted: bytes) -> bytes:
    return next((value for name, value in headers if name == wanted), b"")


class _ClientLeftError(Exception):
    """Nobody is there to answer."""


class _Answer:
    """What was sent, seen on its way."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            if not any(name.lower() == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            message["headers"] = headers
        await self._send(message)
        self.complete |= message["type"] == "http.response.body" and not message.get("more_body", False)

    async def refuse(self, error: ApiError) -> None:
        """The answer, and the end of the connection: what is left of a body is not waited for."""
        content = json.dumps(error.to_dict()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
        pairs = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": content})
