"""A server in a thread of this process, in front of a model that says what a test wants."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from moec.assistant.assistant import Assistant
from moec.assistant.server.app import Server, Settings
from moec.assistant.server.connections import Connection
from moec.compiler.session import SessionBase
from tests.assistant.speaking import assistant


class Running:
    """`url` without a slash at the end; `server` to look at."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url

    def idle(self, seconds: float = 30.0) -> None:
        """Wait until nothing is answered any more."""
        end = time.monotonic() + seconds
        while self.server.engine.running or self.server.engine.waiting:
            assert time.monotonic() < end
            time.sleep(0.01)


@contextlib.contextmanager
def running(
    folder: Path, session: SessionBase, name: str = "chatml", *, speaks: Assistant | None = None, **settings: Any
) -> Iterator[Running]:
    server = Server(speaks or assistant(folder, name), session, Settings("small", **settings))
    config = uvicorn.Config(
        server.app, host="127.0.0.1", port=0, http=Connection, log_level="warning", timeout_graceful_shutdown=2
    )
    listening = uvicorn.Server(config)
    thread = threading.Thread(target=listening.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not listening.started:
        assert time.monotonic() < end
        assert thread.is_alive()
        time.sleep(0.01)
    port = listening.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(server, f"http://127.0.0.1:{port}")
    finally:
        listening.should_exit = True
        thread.join(15)
        server.engine.stop()
        assert not thread.is_alive()
