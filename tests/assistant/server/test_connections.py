"""A server that is busy, that waits for requests which do not come, or whose tokenizer has ended."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server: pip install 'moec[serve]'")
pytest.importorskip("uvicorn", reason="the server: pip install 'moec[serve]'")
httpx = pytest.importorskip("httpx", reason="a client: pip install 'moec[dev]'")

from tests.assistant.server.running import Running, running  # noqa: E402
from tests.assistant.speaking import Speaking, assistant  # noqa: E402

ASK: list[Any] = [{"role": "user", "content": "Hi"}]


def post(at: Running, body: Any) -> Any:
    return httpx.post(f"{at.url}/v1/chat/completions", json=body, timeout=30)


def test_a_queue_of_none_still_answers(tmp_path: Path) -> None:
    go = threading.Event()
    with running(tmp_path, Speaking(["a", "b", "c", "d"], slow=lambda: go.wait(30) and None), most_waiting=0) as at:
        replies: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: replies.append(post(at, {"messages": ASK})))
        thread.start()
        end = time.monotonic() + 20
        while not at.server.engine.running:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert post(at, {"messages": ASK}).status_code == 503
        go.set()
        thread.join(30)
        statuses = [reply.status_code for reply in (*replies, *(post(at, {"messages": ASK}) for _ in range(3)))]
        assert statuses == [200] * 4  # whoever has an answer finds the worker free


def test_connections_without_a_request_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.assistant.server.connections.HEAD_SECONDS", 0.5)
    monkeypatch.setattr("moec.assistant.server.app._BODY_SECONDS", 0.5)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: 2\r\n\r\n" + "{}"
    with running(tmp_path, Speaking(["a"], slow=lambda: time.sleep(0.8))) as at:
        host, port = at.url.removeprefix("http://").split(":")

        def told(*sent: str) -> str:
            """What comes until the server closes the connection."""
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                found = b""
                for index, text in enumerate(sent):
                    connection.sendall(text.encode())
                    found += connection.recv(4096) if index < len(sent) - 1 else b""
                while piece := connection.recv(4096):
                    found += piece
                return found.decode()

        assert told("") == ""  # silent
        assert told(head) == ""  # half a head
        assert told(f"{head}Content-Length: 9\r\n\r\nhalf").startswith("HTTP/1.1 408")
        answered = told(whole, head)  # an answer may take longer; behind it half a head
        assert answered.startswith("HTTP/1.1 200")
        assert answered.count("HTTP/1.1") == 1


def test_too_many_requests_at_once_are_told_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moec.assistant.server.app._MORE_REQUESTS", 1)
    go = threading.Event()
    with running(tmp_path, Speaking(["a"], slow=lambda: go.wait(30) and None), most_waiting=0) as at:
        silent = [socket.create_connection(("127.0.0.1", int(at.url.rsplit(":", 1)[1]))) for _ in range(5)]
        thread = threading.Thread(target=lambda: post(at, {"messages": ASK}))
        thread.start()
        end = time.monotonic() + 20
        while not at.server.engine.running:
            assert time.monotonic() < end
            time.sleep(0.01)
        reply = httpx.get(f"{at.url}/health")
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "too_many_requests")
        go.set()
        thread.join(30)
        assert httpx.get(f"{at.url}/health").status_code == 200  # silent connections are no requests
        for connection in silent:
            connection.close()


def test_a_tokenizer_that_has_ended_is_started_anew_or_health_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaks = assistant(tmp_path)
    with running(tmp_path, Speaking(["Hello."] * 3), speaks=speaks) as at:
        speaks.tokenizer._worker._process.kill()
        speaks.tokenizer._worker._process.wait()
        assert post(at, {"messages": ASK}).json()["choices"][0]["message"]["content"] == "Hello."
        speaks.tokenizer._worker._process.kill()
        speaks.tokenizer._worker._process.wait()

        def none(*_: Any, **__: Any) -> None:
            raise OSError(12, "Cannot allocate memory")

        with monkeypatch.context() as patched:
            patched.setattr("moec.compiler.worker.subprocess.Popen", none)
            reply = httpx.get(f"{at.url}/health", timeout=30)
        assert (reply.status_code, reply.json()["status"]) == (503, "failed")
        assert reply.json()["reason"] == "the tokenizer cannot be started: Cannot allocate memory"
        assert httpx.get(f"{at.url}/health").json() == {"status": "ok", "model": "small"}
        assert post(at, {"messages": ASK}).status_code == 200
