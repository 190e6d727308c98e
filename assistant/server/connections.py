"""Connections that bring no request, and requests beyond what the server takes at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import h11
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from moec.assistant.server.replies import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEAD_SECONDS = 15.0  # for a request's head to arrive, from the beginning of the connection or its first byte


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which by itself lets a connection that never sends a whole head stay open."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The clock runs while a head is awaited; between two requests it is uvicorn's own, until a byte comes."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class AtMost:
    """The application `app`, at most `most` requests at once: more get status 503 and are not read."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._running >= self._most:
            what = f"{self._most} requests are being answered or wait already"
            headers = {"Retry-After": "1", "Connection": "close"}
            refusal = JSONResponse(error_body(what, "server_error", code="too_many_requests"), 503, headers=headers)
            return await refusal(scope, receive, send)
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
