"""The process: a socket, headers that must arrive in time, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from coachhook_fast.serve.app import Service
from coachhook_fast.serve.logs import log

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def protocol(header_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which waits for headers as long as it takes, with an end to it.

    protocol(10.0)
    """

    class Timed(H11Protocol):
        _headers_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._time_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._headers_are_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            answered = self.cycle is None or self.cycle.response_complete
            if answered and self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self._time_headers()
            else:
                self._headers_are_there()

        def _time_headers(self) -> None:
            """From the first byte on: one more byte gives no more time."""
            if self._headers_due is None:
                self._headers_due = self.loop.call_later(header_seconds, self._give_up)

        def _headers_are_there(self) -> None:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None

        def _give_up(self) -> None:
            self._headers_due = None
            self.transport.close()

    return Timed


class Server(uvicorn.Server):
    """uvicorn's server, which ends with its signals' own exit codes; this one has ended well when it has drained."""

    def __init__(self, config: uvicorn.Config, stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {sig: signal.signal(sig, self.handle_exit) for sig in _SIGNALS}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def make_server(service: Service) -> Server:
    """A server of `service`; `run(sockets=[listen(...)])` serves until SIGTERM or Ctrl-C, and then drains.

    server = make_server(service)
    server.run(sockets=[listen("127.0.0.1", 8000)])
    """
    limits = service.limits
    config = uvicorn.Config(
        service.app,
        http=protocol(limits.header_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=max(1, round(limits.header_seconds)),
        timeout_graceful_shutdown=max(1, round(limits.drain_seconds)),
    )

    def stopping() -> None:
        if not service.draining:
            service.draining = True
            log("stopping")

    return Server(config, stopping)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. OSError where the address is not there or taken.

    listen("127.0.0.1", 0).getsockname()[1]
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)
